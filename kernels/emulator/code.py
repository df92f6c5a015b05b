"""From instructions to Python functions: how operands are read and written.

`instruction("add", "sub")` makes known who decodes opcodes that start so: a function from `Operands` to an `Action`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from .errors import Unsupported
from .machine import Action, Machine
from .parsing import Instruction, Program
from .tensormaps import BYTES
from .values import Array, DType, dtype_of, resized, unsigned

Read = Callable[[Machine], Array]
Write = Callable[[Machine, Array], None]
_DECODERS: dict[str, Callable[[Operands], Action]] = {}
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]+)")
PARAMETERS = 1 << 62  # address of the first one
_SHARED = "global_smem"  # the symbol of all shared memory


def instruction(*opcodes: str) -> Callable[[Callable[[Operands], Action]], Callable[[Operands], Action]]:
    def register(decoder: Callable[[Operands], Action]) -> Callable[[Operands], Action]:
        _DECODERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return register


class Code:
    """A kernel, ready to run.

    Attributes:
        widths: bits of all registers that it uses.
        touched: of each instruction, its registers.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.widths: list[int] = []
        self.touched: dict[Instruction, set[int]] = {}
        self._numbers: dict[str, int] = {}
        self.blocks = [[(one, self._decode(one)) for one in block] for block in program.blocks]

    def number(self, register: str) -> int:
        if register not in self._numbers:
            self._numbers[register] = len(self.widths)
            self.widths.append(self.program.bits(register))
        return self._numbers[register]

    def _decode(self, one: Instruction) -> Action:
        parts = one.parts
        for length in (3, 2, 1):
            if decoder := _DECODERS.get(".".join(parts[:length])):
                operands = Operands(one, self)
                action = decoder(operands)
                self.touched[one] = operands.touched
                return action
        known = {
            "tensormap": "TMA descriptors that a kernel makes",
            "cp": "TMA",
            "call": "function calls",
            "setmaxnreg": "warp specialization",
        }
        why = f" ({known[parts[0]]})" if parts[0] in known else ""
        raise Unsupported(f"the instruction {one}{why}, in {self.program.name} at {one.line}")


class Operands:
    """An instruction's operands, to read and write, and its modifiers."""

    def __init__(self, one: Instruction, code: Code) -> None:
        self.one, self.code = one, code
        self.parts, self.texts = one.parts, one.operands
        self.touched: set[int] = set()

    def only(self, modifiers: Iterable[str]) -> None:
        """Refuse what an instruction's decoder does not look at, between its name and its type."""
        for part in self.parts[1:-1]:
            if part not in modifiers:
                raise Unsupported(f"the modifier .{part} of {self.one}")

    @property
    def type(self) -> DType:
        return dtype_of(self.parts[-1])

    def register(self, text: str) -> tuple[int, DType]:
        number = self.code.number(text)
        self.touched.add(number)
        return number, unsigned(self.code.widths[number])

    def vector(self, place: int) -> list[str]:
        """The registers of `{a, b}`; `a` alone is one of them."""
        return [text.strip() for text in self.texts[place].strip("{} ").split(",")]

    def source(self, place: int, dtype: DType | None = None) -> Read:
        return self.read(self.texts[place], self.type if dtype is None else dtype)

    def read(self, text: str, dtype: DType) -> Read:
        """An operand in a type: the lower part of a register that is wider."""
        if text.startswith("%") and (special := _special(text)):
            return lambda machine: special(machine).view(dtype)
        if text in self.code.program.parameters:
            address = _parameter_address(list(self.code.program.parameters).index(text), dtype)
            return lambda machine: address
        if re.match(r"[%a-zA-Z]", text) and text != _SHARED:
            number, own = self.register(text)
            if own == dtype:
                return lambda machine: machine.registers[number]
            if own.itemsize < dtype.itemsize:
                raise Unsupported(f"{text}, of {own}, as {dtype} in {self.one}")
            return lambda machine: resized(machine.registers[number], dtype)
        value = _immediate(text, dtype)
        return lambda machine: value

    def guard(self) -> Callable[[Machine], Array | None]:
        """The threads that execute the instruction; None for all."""
        if self.one.guard is None:
            return lambda machine: machine.active
        number, _ = self.register(self.one.guard)
        negated = self.one.negated

        def threads(machine: Machine) -> Array | None:
            chosen = ~machine.registers[number] if negated else machine.registers[number]
            return chosen if machine.active is None else chosen & machine.active

        return threads

    def target(self, place: int = 0) -> Write:
        return self.write(self.texts[place])

    def write(self, text: str) -> Write:
        """To a register, by the threads that execute the instruction; smaller integers are extended."""
        if text == "_":
            return lambda machine, value: None
        number, dtype = self.register(text)
        guard = self.guard()

        def put(machine: Machine, value: Array) -> None:
            value = resized(value, dtype)
            threads = guard(machine)
            if threads is not None:
                value = np.where(threads, value, machine.registers[number])
            elif len(value) != machine.size:
                value = np.full(machine.size, value)
            machine.registers[number] = value

        return put

    def address(self, place: int) -> Read:
        """Of `[register + offset]`, int64."""
        found = _ADDRESS.fullmatch(self.texts[place])
        if found is None:
            raise Unsupported(f"the address {self.texts[place]} in {self.one}")
        offset = np.int64(int(found[2] or "0", 0))
        if found[1] == _SHARED:
            return lambda machine: np.full(machine.size, offset)
        number, _ = self.register(found[1])
        return lambda machine: machine.registers[number].astype(np.int64) + offset


def _parameter_address(index: int, dtype: DType) -> Array:
    """Of a kernel's parameter, which only TMA looks at."""
    return np.array([PARAMETERS + index * BYTES], np.uint64).astype(dtype)


def _immediate(text: str, dtype: DType) -> Array:
    """One element, to be broadcast."""
    if text == _SHARED:
        return np.zeros(1, dtype)
    if dtype == np.dtype(bool):
        return np.array([int(text, 0) != 0])
    if hexadecimal := _FLOAT.fullmatch(text):
        return np.array([int(hexadecimal[1], 16)], f"u{len(hexadecimal[1]) // 2}").view(dtype)
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], f"u{dtype.itemsize}").view(dtype)


def _special(text: str) -> Read | None:
    name, _, axis = text.partition(".")
    if name == "%laneid":
        return lambda machine: machine.lane
    if not axis:
        return None
    index = "xyz".index(axis)
    if name == "%tid":
        return lambda machine: machine.thread * np.uint32(index == 0)
    if name == "%ntid":
        return lambda machine: np.array([machine.code.program.threads if index == 0 else 1], np.uint32)
    if name == "%nctaid":
        return lambda machine: np.array([machine.grid[index]], np.uint32)
    if name == "%ctaid":

        def number(machine: Machine) -> Array:
            return (machine.cta // int(np.prod(machine.grid[:index])) % machine.grid[index]).astype(np.uint32)

        return number
    raise Unsupported(f"the register {text}")
