"""TMA and mbarriers: boxes of tensors with the layouts that the PTX manual gives, and what has to be waited for."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

from hilora.kernels.emulator import driver
from hilora.kernels.emulator.errors import Fault, Unsupported
from hilora.kernels.emulator.tensormaps import BYTES
from hilora.kernels.emulator.values import Array

from .snippets import kernel, run

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for libcuda is compiled by gcc")

TYPES = {"u1": 0, "u2": 1, "u4": 2, "f2": 6, "f4": 7, "f8": 8}  # as cuda.h has them
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
THREADS = 128
BARRIER = 32768  # its place in shared memory


def encoded(
    array: Array, box: Sequence[int], swizzle: int = 0, nan: bool = False, sizes: Sequence[int] | None = None,
    shift: int = 0,
) -> tuple[int, bytes]:  # fmt: skip
    """What libcuda says, and a descriptor of a tensor whose axes are an array's, but for padding behind `sizes`."""
    rank = array.ndim
    found = (ctypes.c_uint8 * BYTES)()
    given = [*(sizes or array.shape)][::-1]
    code = driver.library().cuTensorMapEncodeTiled(
        found,
        TYPES[array.dtype.str[1:]],
        rank,
        ctypes.c_uint64(array.ctypes.data + shift),
        (ctypes.c_uint64 * rank)(*given),
        (ctypes.c_uint64 * rank)(*array.strides[::-1][1:]),
        (ctypes.c_uint32 * rank)(*box[::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        SWIZZLES[swizzle],
        0,
        int(nan),
    )
    return code, bytes(found)


def random(dtype: str, *shape: int) -> Array:
    return np.random.default_rng(0).integers(1, 100, shape).astype(dtype)


def image(box: Array, swizzle: int) -> Array:
    """Bytes of a box in shared memory: where the pieces of 16 bytes lie, within lines of 128."""
    flat = np.ascontiguousarray(box).view(np.uint8).ravel()
    found = np.empty_like(flat)
    for start in range(0, len(flat), 16):
        line, piece = divmod(start // 16, 8)
        moved = piece ^ line % (swizzle // 16) if swizzle else piece
        found[128 * line + 16 * moved :][:16] = flat[start : start + 16]
    return found


def taken(array: Array, box: Sequence[int], corner: Sequence[int], sizes: Sequence[int], outside: float = 0) -> Array:
    """A box of an array, element by element."""
    found = np.full(box, outside, array.dtype)
    for place in np.ndindex(*box):
        at = tuple(c + p for c, p in zip(corner, place, strict=True))
        if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
            found[place] = array[at]
    return found


WAIT = """
    {{ .reg .pred complete; waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [global_smem+{at}], {parity};
    @!complete bra.uni waitLoop; }}
"""


def wait(parity: int) -> str:
    return WAIT.format(at=BARRIER, parity=parity)


def load(axes: str, bytes: int, rank: int, to: int = 0) -> str:
    how = f"{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"""
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+{BARRIER}], {bytes};
        @%p1 cp.async.bulk.tensor.{how} [global_smem+{to}], [%rd70, {{{axes}}}], [global_smem+{BARRIER}];
    """


START = f"""
    setp.eq.u32 %p1, %r90, 0;
    @%p1 mbarrier.init.shared::cta.b64 [global_smem+{BARRIER}], 1;
    bar.sync 0;
"""


def copied(bytes: int, there: bool) -> str:
    """Between shared memory and the second array, by all threads."""
    shared, array = ("ld.shared", "st.global") if there else ("st.shared", "ld.global")
    first, second = (f"{shared}.b32 %r3, [%r2];", f"{array}.b32 [%rd2], %r3;")
    if not there:
        first, second = f"{array}.b32 %r3, [%rd2];", f"{shared}.b32 [%r2], %r3;"
    return f"""
        mov.b32 %r1, %r90;
    $copy:
        setp.ge.u32 %p2, %r1, {bytes // 4};
        @%p2 bra $copied;
        shl.b32 %r2, %r1, 2;
        cvt.u64.u32 %rd1, %r2;
        add.s64 %rd2, %rd91, %rd1;
        {first}
        {second}
        add.s32 %r1, %r1, {THREADS};
        bra.uni $copy;
    $copied:
        bar.sync 0;
    """


BOXES = [
    ("u2", (40, 72), (16, 64), 128, (0, 0)),
    ("u2", (40, 72), (16, 64), 128, (30, 40)),  # beyond both ends
    ("u2", (40, 72), (16, 64), 128, (-5, -3)),  # before the first, and not on a chunk
    ("u2", (40, 72), (8, 32), 64, (3, 16)),
    ("u2", (40, 72), (32, 16), 32, (8, 8)),
    ("u2", (40, 72), (16, 64), 0, (1, 1)),
    ("f4", (12, 36), (8, 32), 128, (6, 8)),
    ("u1", (12, 144), (8, 128), 128, (6, 32)),
    ("u2", (5, 10, 24), (2, 8, 16), 32, (4, 5, 8)),
    ("f8", (7, 30), (4, 16), 128, (5, 16)),
]


@pytest.mark.parametrize(("dtype", "shape", "box", "swizzle", "corner"), BOXES)
def test_boxes_are_loaded(
    dtype: str, shape: tuple[int, ...], box: tuple[int, ...], swizzle: int, corner: tuple[int, ...]
) -> None:  # fmt: skip
    array = random(dtype, *shape)
    sizes = (*shape[:-1], shape[-1] - 3)  # what lies behind belongs to no row
    code, descriptor = encoded(array, box, swizzle, sizes=sizes)
    assert code == 0
    size = int(np.prod(box)) * array.itemsize
    found = np.zeros(size, np.uint8)
    axes = ", ".join(map(str, corner[::-1]))
    body = START + load(axes, size, len(shape)) + wait(0) + copied(size, there=True)
    assert not run(kernel(body, 2, THREADS, maps=1), array, found, shared=BARRIER + 8, maps=[descriptor])
    assert (found == image(taken(array, box, corner, sizes), swizzle)).all()


@pytest.mark.parametrize(("dtype", "shape", "box", "swizzle", "corner"), BOXES)
def test_boxes_are_stored(
    dtype: str, shape: tuple[int, ...], box: tuple[int, ...], swizzle: int, corner: tuple[int, ...]
) -> None:  # fmt: skip
    array, given = random(dtype, *shape), random(dtype, *box)
    before = array.copy()
    code, descriptor = encoded(array, box, swizzle)
    assert code == 0
    axes = ", ".join(map(str, corner[::-1]))
    body = f"""
        setp.eq.u32 %p1, %r90, 0;
        {copied(given.nbytes, there=False)}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @%p1 cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.bulk_group [%rd70, {{{axes}}}], [global_smem];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
    """
    ptx = kernel(body, 2, THREADS, maps=1)
    assert not run(ptx, array, image(given, swizzle), shared=BARRIER, maps=[descriptor])
    for place in np.ndindex(*box):
        at = tuple(c + p for c, p in zip(corner, place, strict=True))
        if all(0 <= a < size for a, size in zip(at, shape, strict=True)):
            before[at] = given[place]
    assert (array == before).all()


def test_what_lies_outside_may_be_nan() -> None:
    array = random("f4", 8, 32)
    descriptor = encoded(array, (8, 32), 128, nan=True)[1]
    found = np.zeros(1024, np.uint8)
    body = START + load("4, 0", 1024, 2) + wait(0) + copied(1024, there=True)
    run(kernel(body, 2, THREADS, maps=1), array, found, shared=BARRIER + 8, maps=[descriptor])
    wanted = image(taken(array, (8, 32), (0, 4), (8, 32), outside=np.nan), 128)
    np.testing.assert_array_equal(found.view("f4"), wanted.view("f4"))


def test_what_no_descriptor_can_say() -> None:
    """As cuTensorMapEncodeTiled refuses it: bases, strides and rows of 16 bytes, boxes of up to 256."""
    assert encoded(random("u2", 8, 64), (8, 64), 128)[0] == 0
    assert encoded(random("u2", 8, 64), (8, 64), 128, shift=2)[0] != 0
    assert encoded(random("u2", 8, 65), (8, 64), 128)[0] != 0
    assert encoded(random("u2", 8, 64), (8, 20))[0] != 0
    assert encoded(random("u2", 8, 64), (8, 64), 64)[0] != 0
    assert encoded(random("u2", 600, 64), (512, 64), 128)[0] != 0


def test_what_is_no_descriptor() -> None:
    body = START + load("0, 0", 1024, 2)
    array = random("f4", 8, 32)
    descriptor = encoded(array, (8, 32), 128)[1]
    with pytest.raises(Fault, match="whose descriptor is none"):
        run(kernel(body, maps=1), array, shared=BARRIER + 8, maps=[bytes(BYTES)])
    with pytest.raises(Unsupported, match="a TMA descriptor in memory"):
        run(kernel(body.replace("%rd70", "%rd90"), maps=1), array, shared=BARRIER + 8, maps=[descriptor])
    with pytest.raises(Fault, match="a tensor with 2 axes"):
        run(kernel(START + load("0, 0, 0", 1024, 3), maps=1), array, shared=BARRIER + 8, maps=[descriptor])
    with pytest.raises(Fault, match="no multiple of 128 bytes"):
        run(kernel(START + load("0, 0", 1024, 2, to=64), maps=1), array, shared=BARRIER + 8, maps=[descriptor])


ROUND = f"""
    {START}
    {load("0, 0", 2048, 2)}
    {wait(0)}
    shl.b32 %r1, %r90, 2;
    ld.shared.b32 %r2, [%r1];
    bar.sync 0;
    {load("0, 16", 2048, 2)}
    {wait(1)}
    ld.shared.b32 %r3, [%r1];
    st.shared.b32 [%r1+4096], %r2;
    st.shared.b32 [%r1+4608], %r3;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd71, {{0, 0}}], [global_smem+4096];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    st.shared.b32 [%r1+4096], %r3;
    st.shared.b32 [%r1+4608], %r2;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [global_smem+{BARRIER}];
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd71, {{0, 16}}], [global_smem+4096];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
"""
"""Two loads to one buffer, then two stores from another."""


def found_in(body: str) -> set[str]:
    given, result = random("u2", 32, 64), np.zeros((32, 16), np.uint16)
    maps = [encoded(given, (16, 64), 128)[1], encoded(result, (16, 16), 32)[1]]
    races = run(kernel(body, 2, THREADS, maps=2), given, result, shared=BARRIER + 8, maps=maps)
    return {re.sub(" in shared.*|, .*", "", what) for what in races}


def without(body: str, statement: str, which: int) -> str:
    found = [match.span() for match in re.finditer(statement, body, re.DOTALL)][which]
    return body[: found[0]] + body[found[1] :]


def test_a_right_kernel_is_silent() -> None:
    assert found_in(ROUND) == set()


WAITING = r"\{ \.reg \.pred complete;.*?waitLoop; \}"


@pytest.mark.parametrize(
    ("statement", "which", "found"),
    [
        ("bar.sync 0;", 0, "read after write in an mbarrier"),
        (WAITING, 0, "read of a TMA load in flight"),
        ("bar.sync 0;", 1, "TMA load after read"),
        (WAITING, 1, "read of a TMA load in flight"),
        ("fence.proxy.async.shared::cta;", 0, "TMA store of a write without fence.proxy.async"),
        ("bar.sync 0;", 2, "TMA store after write"),
        ("cp.async.bulk.commit_group;", 0, "write under a TMA store in flight"),
        ("cp.async.bulk.wait_group.read 0;", 0, "write under a TMA store in flight"),
        ("bar.sync 0;", 3, "write under a TMA store in flight"),
        ("fence.proxy.async.shared::cta;", 1, "TMA store of a write without fence.proxy.async"),
        ("cp.async.bulk.commit_group;", 1, "end under a TMA store in flight"),
        ("cp.async.bulk.wait_group 0;", 0, "end under a TMA store in flight"),
    ],
)
def test_a_missing_statement_is_found(statement: str, which: int, found: str) -> None:
    assert found in found_in(without(ROUND, statement, which))


def test_a_load_over_what_threads_wrote() -> None:
    body = START + "shl.b32 %r1, %r90, 2; st.shared.b32 [%r1], %r1; FENCE bar.sync 0;" + load("0, 0", 2048, 2) + wait(0)
    assert found_in(body.replace("FENCE", "fence.proxy.async.shared::cta;")) == set()
    assert found_in(body.replace("FENCE", "")) == {"TMA load over a write without fence.proxy.async"}


def test_a_load_that_nobody_awaits() -> None:
    assert found_in(START + load("0, 0", 2048, 2)) == {"end under a TMA load in flight"}


def test_one_warp_waits_for_all_where_a_barrier_follows() -> None:
    alone = "setp.ge.u32 %p3, %r90, 32; @%p3 bra $others;" + wait(0) + "$others:"
    read = "shl.b32 %r1, %r90, 2; ld.shared.b32 %r2, [%r1];"
    assert found_in(START + load("0, 0", 2048, 2) + alone + "bar.sync 0;" + read) == set()
    assert found_in(START + load("0, 0", 2048, 2) + alone + read) == {"read of a TMA load in flight"}


def test_a_phase_waits_for_all_arrivals_and_all_bytes() -> None:
    """Here threads that wait run before those that they wait for."""
    body = f"""
        setp.eq.u32 %p1, %r90, 0;
        @%p1 mbarrier.init.shared::cta.b64 [global_smem+{BARRIER}], 96;
        bar.sync 0;
        setp.ge.u32 %p2, %r90, 32;
        @%p2 bra $later;
        {wait(0)}
        bra.uni $end;
    $later:
        mbarrier.arrive.shared::cta.b64 _, [global_smem+{BARRIER}];
    $end:
        mov.b32 %r1, 0;
    """
    assert found_in(body) == set()
    with pytest.raises(Fault, match="threads wait for an mbarrier that nothing completes"):
        found_in(body.replace("], 96", "], 97"))
    with pytest.raises(Fault, match="more arrivals"):
        found_in(body.replace("], 96", "], 60"))
    with pytest.raises(Fault, match="nothing completes"):
        found_in(START + load("0, 0", 2049, 2) + wait(0))
    with pytest.raises(Fault, match="nothing completes"):
        found_in(START + load("0, 0", 2048, 2) + wait(1) + wait(1))


def test_mbarriers_are_made_once_and_before_they_are_used() -> None:
    init = f"@%p1 mbarrier.init.shared::cta.b64 [global_smem+{BARRIER}], 1; bar.sync 0;"
    with pytest.raises(Fault, match="where there is one"):
        found_in(START + init)
    with pytest.raises(Fault, match="there is no mbarrier at 32768"):
        found_in(START.replace("mbarrier.init", "mbarrier.inval").replace("], 1;", "];"))
    again = f"@%p1 mbarrier.inval.shared::cta.b64 [global_smem+{BARRIER}]; bar.sync 0;" + init
    once = load("0, 0", 2048, 2) + wait(0)
    assert found_in(START + once + "bar.sync 0;" + again + once) == set()
