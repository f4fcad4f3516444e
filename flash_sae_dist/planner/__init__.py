"""What a launch takes, predicted before it: memory, bytes on the wire, time, disk.

Figures are of shapes alone: nothing is allocated and no GPU is needed. `memory.py` and `wire.py`
count what the engines allocate and send; `timing.py` is a roofline with measured rates.
"""
