"""What is known about chips, and about which kernel configuration suits them.

``hardware`` holds the limits of the GPUs and finds out which one is there, ``workloads`` the problems that are tuned.
``static_tuner`` ranks configurations by their compiled code (``static_model``), ``measured_tuner`` by running them.
``table`` is what kernels ask, ``store`` keeps results, ``source`` tells whether they are still of this source.
"""
