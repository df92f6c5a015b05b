"""PTX text to instructions in basic blocks."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import Unsupported
from .tensormaps import BYTES
from .values import dtype_of

_TOKEN = re.compile(
    r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>\$?[\w$]+):(?!:)|(?P<brace>[{}])|(?P<statement>[^;]*);)"
)
_STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)")
_ENDS = ("bra", "brx", "ret", "exit", "trap")  # of a block


class Instruction(NamedTuple):
    """`@guard opcode operands;`, and the line of the kernel's source that it came from."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False
    line: str = ""

    @property
    def parts(self) -> list[str]:
        """Of the opcode: `ld`, `global`, `v4`, `b32`."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass
class Program:
    """A kernel.

    Attributes:
        parameters: bytes of each, by name.
        registers: bits of each, by name; 1 for predicates.
        blocks: instructions that run one after another; control falls from each block into the next.
        labels: the blocks where they stand.
        targets: of indirect branches, by the label of their table.
    """

    name: str
    threads: int
    parameters: dict[str, int]
    registers: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)

    def bits(self, register: str) -> int:
        """Declared one by one, or as many of a kind: `.reg .b32 %r<9>` are `%r0` to `%r8`."""
        found = self.registers.get(register) or self.registers.get(re.sub(r"\d+$", "", register) + "<")
        if found is None:
            raise Unsupported(f"{register}, which is no register of {self.name}")
        return found


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        Unsupported: where it is for sm_100 or needs what the emulator does not have.
    """
    files = {number: path.rpartition("/")[2] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    if found := re.search(r"\btcgen05\.[\w.]+", text):
        raise Unsupported(f"{found[0]}: tensor memory of sm_100 is not emulated, compile for sm_90 or sm_80")
    text = _with_own_labels(text)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.DOTALL)
    if entry is None:
        raise Unsupported("PTX without a kernel")
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise Unsupported(f"{name}: a kernel for any number of threads")
    program = Program(name, int(threads[1]), dict(map(_parameter, filter(str.strip, parameters.split(",")))))
    _read_body(program, text, entry.end(), files)
    return program


def _with_own_labels(text: str) -> str:
    """Labels of inner blocks get names that no other has."""
    number = itertools.count()

    def own(block: re.Match[str]) -> str:
        for label in re.findall(r"([\w$]+):(?!:)", block[0]):
            if re.search(rf"[{{;]\s*{re.escape(label)}:", block[0]):
                return re.sub(rf"(?<![\w.$%]){re.escape(label)}(?![\w.$])", f"{label}_{next(number)}", block[0])
        return block[0]

    return re.sub(r"\{[^{}]*\}", own, text)


def _parameter(text: str) -> tuple[str, int]:
    declared = re.search(
        r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*?\s+([\w$]+)(\[\d+\])?\s*$", text
    )
    if declared is None:
        raise Unsupported(f"the parameter {text.strip()!r}")
    if declared[3] and declared[1] + declared[3] != f"b8[{BYTES}]":
        raise Unsupported(f"the parameter {text.strip()!r}, which is no TMA descriptor")
    return declared[2], BYTES if declared[3] else dtype_of(declared[1]).itemsize


def _read_body(program: Program, text: str, position: int, files: dict[str, str]) -> None:
    depth, line, label = 1, "", ""
    while depth:
        token = _TOKEN.match(text, position)
        if token is None:
            raise Unsupported(f"the text {text[position : position + 40]!r}")
        position = token.end()
        if token["file"]:
            line = f"{files.get(token['file'], '?')}:{token['line']}"
        elif token["label"]:
            label = token["label"]
            if program.blocks[-1]:
                program.blocks.append([])
            program.labels[label] = len(program.blocks) - 1
        elif token["brace"]:
            depth += 1 if token["brace"] == "{" else -1
        else:
            _read_statement(program, " ".join(token["statement"].split()), label, line)


def _read_statement(program: Program, statement: str, label: str, line: str) -> None:
    if statement.startswith(".reg"):
        kind, names = statement[len(".reg") :].split(maxsplit=1)
        bits = 1 if kind == ".pred" else 8 * dtype_of(kind[1:]).itemsize
        for register in names.split(","):
            program.registers[re.sub(r"<\d+>", "<", register.strip())] = bits
    elif statement.startswith(".branchtargets"):
        program.targets[label] = [target.strip() for target in statement[len(".branchtargets") :].split(",")]
    elif statement and not statement.startswith(".pragma"):
        found = _STATEMENT.fullmatch(statement)
        if found is None:
            raise Unsupported(f"{program.name}: the statement {statement!r}")
        operands = tuple(_split(found["operands"]))
        instruction = Instruction(found["opcode"], operands, found["guard"], found["negated"] == "!", line)
        program.blocks[-1].append(instruction)
        if instruction.parts[0] in _ENDS:
            program.blocks.append([])


def _split(operands: str) -> list[str]:
    """At commas outside of vectors and addresses."""
    return [found.strip() for found in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]
