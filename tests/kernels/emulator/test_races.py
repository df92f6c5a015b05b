"""Kernels that are right are silent; without a barrier, wait or fence they are found out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hilora.kernels.emulator.errors import Unsupported

from .snippets import kernel, run

WARPS = 4
THREADS = 32 * WARPS

EXCHANGE = """
    shl.b32 %r1, %r90, 2;
    xor.b32 %r2, %r1, 128;
    st.shared.b32 [%r1], %r90;
    bar.sync 0;
    ld.shared.b32 %r3, [%r2];
    bar.sync 0;
    st.shared.b32 [%r1], %r3;
"""
COPY = """
    mad.lo.s64 %rd1, %rd80, 4, %rd90;
    shl.b32 %r1, %r90, 2;
    xor.b32 %r2, %r1, 128;
    cp.async.ca.shared.global [%r1], [%rd1], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+1024], [%rd1], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    ld.shared.b32 %r3, [%r2];
    bar.sync 0;
    cp.async.ca.shared.global [%r1], [%rd1], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
"""
PRODUCT = """
    shl.b32 %r1, %r90, 4;
    st.shared.v4.b32 [%r1], {%r1, %r1, %r1, %r1};
    st.shared.v4.b32 [%r1+2048], {%r1, %r1, %r1, %r1};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %rd10, %rd10, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r24, %r20, %r21;
    bar.sync 0;
    st.shared.v4.b32 [%r1], {%r1, %r1, %r1, %r1};
"""
PRODUCT = f"mov.b64 %rd10, {1 << 62 | 64 << 32};" + PRODUCT


def races(body: str, threads: int = THREADS) -> set[str]:
    found = run(kernel(body, threads=threads), np.zeros(threads, np.float32), shared=8192)
    return {re.sub(" in shared.*|, .*", "", what) for what in found}


def without(body: str, statement: str, which: int = 0) -> str:
    """All but one of the statements that start so."""
    found = [match.span() for match in re.finditer(rf"{re.escape(statement)}[^;]*;", body)][which]
    return body[: found[0]] + body[found[1] :]


@pytest.mark.parametrize("body", [EXCHANGE, COPY, PRODUCT], ids=["exchange", "copy", "product"])
def test_a_right_kernel_is_silent(body: str) -> None:
    assert races(body) == set()


@pytest.mark.parametrize(
    ("body", "statement", "which", "found"),
    [
        (EXCHANGE, "bar.sync", 0, {"read after write"}),
        (EXCHANGE, "bar.sync", 1, {"write after read"}),
        (COPY, "cp.async.wait_group", 0, {"read of a cp.async in flight", "cp.async of a cp.async in flight"}),
        (COPY, "bar.sync", 0, {"read after cp.async"}),
        (COPY, "bar.sync", 1, {"cp.async after read"}),
        (COPY, "cp.async.commit_group", 0, {"read of a cp.async in flight"}),
        (PRODUCT, "fence.proxy", 0, {"wgmma on a write without fence.proxy.async"}),
        (PRODUCT, "bar.sync", 0, {"wgmma after write"}),
        (PRODUCT, "bar.sync", 1, {"write after wgmma"}),
        (without(PRODUCT, "wgmma.wait_group"), "wgmma.commit", 0, {"write under a wgmma in flight"}),
        (PRODUCT, "wgmma.wait_group", 0, {"use of a wgmma's accumulator in flight", "write under a wgmma in flight"}),
    ],
)
def test_a_missing_statement_is_found(body: str, statement: str, which: int, found: set[str]) -> None:
    assert found <= races(without(body, statement, which))


def test_warps_that_exchange_within_themselves_need_no_barrier() -> None:
    assert races(re.sub(r"bar\.sync[^;]*;", "", EXCHANGE.replace("%r1, 128", "%r1, 4"))) == set()


def test_products_on_a_copy_in_flight() -> None:
    copy = """
        mov.b32 %r9, 0;
        setp.eq.u32 %p1, %r90, 0;
        @%p1 cp.async.ca.shared.global [%r9], [%rd90], 4;
        wgmma.fence"""
    assert "wgmma on a cp.async in flight" in races(PRODUCT.replace("wgmma.fence", copy))


def test_ctas_that_meet() -> None:
    same = "st.global.b32 [%rd1], %r1;"
    address = "mov.u32 %r1, %ctaid.x; mad.lo.s64 %rd1, %rd80, 4, %rd90;"
    array = np.zeros(64, np.int32)

    def found(body: str) -> set[str]:
        return {what.partition(" in ")[0] for what in run(kernel(address + body), array, grid=(100, 1, 1))}

    assert "CTAs: write after write" in found(same)
    reader = f"setp.ne.u32 %p1, %r1, 7; @%p1 ld.global.b32 %r2, [%rd1]; @!%p1 {same}"
    assert found(reader) == {"CTAs: write after read"} or "CTAs: read after write" in found(reader)
    assert found("ld.global.b32 %r2, [%rd1];") == set()


def test_races_within_global_memory() -> None:
    body = """
        mad.lo.s64 %rd1, %rd80, 4, %rd90;
        xor.b64 %rd3, %rd80, 32;
        mad.lo.s64 %rd2, %rd3, 4, %rd90;
        st.global.b32 [%rd1], %r90;
        bar.sync 0;
        ld.global.b32 %r1, [%rd2];
    """
    array = np.zeros(64, np.int32)
    assert not run(kernel(body, threads=64), array)
    assert set(run(kernel(without(body, "bar.sync"), threads=64), array)) == {
        "read after write in array 0, ld.global.b32 %r1, [%rd2]"
    }


def test_one_store_of_several_values_to_one_place() -> None:
    assert races("st.shared.b32 [%r1], %r90;") == {"different values by one store"}
    assert races("st.shared.b32 [%r1], %r2;") == set()


BRANCHES = """
    setp.lt.u32 %p1, %r90, 10;
    @%p1 bra $low;
    mul.lo.s32 %r1, %r90, 3;
    setp.gt.u32 %p2, %r90, 40;
    @%p2 ret;
    bra.uni $join;
$low:
    mov.b32 %r2, 0;
    mov.b32 %r1, 0;
$loop:
    add.s32 %r1, %r1, %r2;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p3, %r2, %r90;
    @%p3 bra $loop;
$join:
    add.s32 %r1, %r1, 1000;
    mad.lo.s64 %rd1, %rd80, 4, %rd90;
    st.global.b32 [%rd1], %r1;
"""


def test_threads_may_part_and_meet_again() -> None:
    found = np.zeros(64, np.int32)
    assert not run(kernel(BRANCHES, threads=64), found)
    assert found.tolist() == [1000 + sum(range(t + 1)) if t < 10 else 1000 + 3 * t if t <= 40 else 0 for t in range(64)]


def test_a_barrier_that_some_threads_pass_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"bar\.sync 0 by some threads of 64"):
        run(kernel(BRANCHES.replace("mov.b32 %r2, 0;", "mov.b32 %r2, 0; bar.sync 0;"), threads=64), np.zeros(64))


def test_ctas_may_part() -> None:
    """Each passes as many barriers as its number, and its warps exchange what they have."""
    body = """
        mov.u32 %r5, %ctaid.x;
        mov.b32 %r6, 0;
        shl.b32 %r1, %r90, 2;
        xor.b32 %r2, %r1, 128;
        mov.b32 %r3, %r90;
    $loop:
        setp.ge.u32 %p1, %r6, %r5;
        @%p1 bra $end;
        st.shared.b32 [%r1], %r3;
        bar.sync 0;
        ld.shared.b32 %r3, [%r2];
        bar.sync 0;
        add.s32 %r6, %r6, 1;
        bra.uni $loop;
    $end:
        mad.lo.s32 %r7, %r5, 64, %r90;
        mul.wide.u32 %rd1, %r7, 4;
        add.s64 %rd2, %rd90, %rd1;
        st.global.b32 [%rd2], %r3;
    """
    found = np.zeros((5, 64), np.int32)
    assert not run(kernel(body, threads=64), found, grid=(5, 1, 1))
    for cta, row in enumerate(found):
        assert row.tolist() == [thread ^ (32 if cta % 2 else 0) for thread in range(64)]
    assert run(kernel(without(body, "bar.sync", 1), threads=64), found, grid=(5, 1, 1))


def test_indirect_branches() -> None:
    body = """
        and.b32 %r1, %r90, 1;
        $table: .branchtargets $even, $odd;
        brx.idx %r1, $table;
    $even:
        mov.b32 %r2, 5;
        bra.uni $end;
    $odd:
        mov.b32 %r2, 7;
    $end:
        mad.lo.s64 %rd1, %rd80, 4, %rd90;
        st.global.b32 [%rd1], %r2;
    """
    found = np.zeros(32, np.int32)
    run(kernel(body), found)
    assert found.tolist() == [5, 7] * 16
