"""What is known about chips, and about which kernel configuration suits them.

``hardware`` holds the limits of the GPUs, ``table`` looks up the shipped tuning results.
"""
