/* Draws answers and places on a Leaflet map. Every name goes into the page as text, never as HTML. */
"use strict";
function drawTetraMap(map, data) {
  const colours = {true: "#1a9850", false: "#d73027", null: "#9a9a9a", place: "#7d8ca3", track: "#2b5c8a"};
  const verdicts = {true: "accepted", false: "rejected", null: "not judged"};

  function lines(...texts) {
    const box = document.createElement("div");
    for (const text of texts.filter(text => text !== "")) {
      box.appendChild(document.createElement("div")).textContent = text;
    }
    return box;
  }
  function picture(number, title) {
    const box = document.createElement("figure");
    box.className = "tetra-picture";
    const image = box.appendChild(document.createElement("img"));
    image.src = data.pictures[number];
    image.alt = title;
    box.appendChild(document.createElement("figcaption")).textContent = title;
    return box;
  }
  function where(xy) {
    return xy === null ? "position unknown" : "(" + xy[0].toFixed(1) + ", " + xy[1].toFixed(1) + ")";
  }
  function describe(frame) {
    const spread = frame.spread_m === null ? "" : " ± " + frame.spread_m.toFixed(1) + " m";
    const box = lines(
      frame.name,
      verdicts[frame.accepted] + ": " + frame.id,
      frame.distance + " bits, margin " + frame.margin,
      where(frame.xy) + spread
    );
    const pictures = box.appendChild(document.createElement("div"));
    if (frame.picture !== null) pictures.appendChild(picture(frame.picture, "frame"));
    if (frame.match_picture !== null) pictures.appendChild(picture(frame.match_picture, "best match"));
    return box;
  }
  function explain(layer, content) {
    layer.bindTooltip(content);
    layer.bindPopup(content);  // for fingers, which do not hover
    return layer;
  }

  const places = L.layerGroup(), track = L.layerGroup(), links = L.layerGroup();
  const spreads = L.layerGroup(), frames = L.layerGroup();
  const points = [];
  for (const place of data.places) {
    points.push(place.at);
    const dot = L.circleMarker(place.at, {radius: 3, weight: 0, fillOpacity: 0.6, fillColor: colours.place});
    explain(dot, () => lines(place.id, where(place.xy))).addTo(places);
  }
  for (const line of data.tracks) {
    L.polyline(line, {color: colours.track, weight: 2, opacity: 0.6, interactive: false}).addTo(track);
  }
  for (const frame of data.frames) {
    if (frame.at === null) continue;
    points.push(frame.at);
    const colour = colours[frame.accepted];
    if (frame.to !== null) {
      points.push(frame.to);
      L.polyline([frame.at, frame.to], {color: colour, weight: 1, interactive: false}).addTo(links);
    }
    if (frame.spread_m !== null) {
      const look = {radius: frame.spread_m, color: colour, weight: 1, fillOpacity: 0.08, interactive: false};
      L.circle(frame.at, look).addTo(spreads);
    }
    const dot = L.circleMarker(frame.at, {radius: 6, weight: 1, color: "#ffffff", fillOpacity: 0.9, fillColor: colour});
    explain(dot, () => describe(frame)).addTo(frames);
  }

  const layers = {
    "places of the map": places, "track": track, "lines to the best match": links, "spread": spreads, "frames": frames
  };
  for (const layer of Object.values(layers)) layer.addTo(map);
  L.control.layers(null, layers).addTo(map);
  const legend = L.control({position: "bottomright"});
  legend.onAdd = () => {
    const box = lines(...data.legend);
    box.className = "tetra-legend";
    return box;
  };
  legend.addTo(map);
  map.setMinZoom(data.zooms[0]);
  map.setMaxZoom(data.zooms[1]);
  if (points.length) map.fitBounds(L.latLngBounds(points), {padding: [30, 30], animate: false});
}
