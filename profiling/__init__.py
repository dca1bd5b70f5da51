"""What kernels cost, without a GPU.

``sass`` counts registers, spills and instructions of compiled kernels, ``report`` describes all of them,
``roofline`` predicts what a launch takes, ``model_cost`` adds launches up to a block and a model.
"""
