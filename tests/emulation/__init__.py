"""The CUDA kernels on a CPU: every thread a fiber, every launch a schedule drawn from a seed.

Kernels use nothing of CUDA but the names of csrc/cuda/device.h. Here the same names are functions of a CPU, so that
the same sources, compiled by the C++ compiler, run in the tests of any machine under the ops of CPU tensors.

    emulated_device.h  the names: places, shuffles, barriers, copies, half precision
    emulation.cpp      the scheduler, and what it reports
    build.py           the package with these kernels in it, also with sanitizers, also with faults planted
    control.py         schedules, devices and launch plans, as tests set them
    cases.py           what the kernels must get right
    ../test_cuda_emulation.py   runs the cases, and existing tests, in these builds

What it proves: indexing, heads and tails of rows, reduction trees, formulas, dtypes, the placement of barriers and of
waits for asynchronous copies. Threads run in every order that the seed draws, the hasty ones far ahead; shared memory
begins as poison and ends with its block; a copy shows only after the wait for it. These end a launch with a report:
barriers that not all threads reach, warps that part before a shuffle, a block that is read after its end, accesses of
16 bytes at other addresses, stores outside of shared memory. Under AddressSanitizer so does any access out of bounds.

What it does not: races between neighbouring instructions (a fiber is only left where it waits) and whatever else the
memory model allows; that registers and occupancy suffice; the digits of the fast exponential, which here is exact to
the last one; contraction to fused multiply-adds; speed. These take a GPU: see tests/gpu.
"""
