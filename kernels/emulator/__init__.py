"""An emulator of the PTX that Triton compiles kernels to: it runs them without a GPU, and finds data races.

Launches of kernels on CPU tensors are compiled for a GPU and sent through Triton's own launcher, under which `driver`
puts a stand-in for libcuda. `parsing` reads the PTX, `code` and `instructions` make a Python function of each
instruction, `machine` runs thread blocks (CTAs) side by side, numpy over their threads; `memory` checks addresses and
`races` who touched what since the last barrier. The tests use it: `pytest tests/kernels --emulate sm_90`.

What it takes for granted: the lanes of a warp run in lockstep, a copy by `cp.async` has landed by the time of its wait,
and products are summed in fp32 in any order. It knows nothing of time, nor of what ptxas makes of the PTX.
"""
