"""What must hold on a GPU before anything is timed: the checks that benchmarks/device.py and the tests run, on a CPU too."""
