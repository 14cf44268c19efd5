"""Reading a compiled program: what its devices say to each other, and how much they move in memory.

From the text of XLA's program, as `compiled.as_text()` gives it. Loops are counted as often as they
run.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'c64': 64, 'c128': 128}

# Instructions that move nothing by themselves.
FREE = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional'),
    *('call', 'after-all', 'iota', 'partition-id', 'replica-id', 'async-start', 'async-update'),
    *('async-done', 'copy-start', 'copy-done', 'opt-barrier', 'custom-call-done'),
}

_HEAD = re.compile(r'^(?:ENTRY )?%?(\S+) \(.*\) -> .*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:body|condition|to_apply|calls)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program: name = type opcode(operands), attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, end = 1, len(self.rest)
        for i, char in enumerate(self.rest):
            depth += (char in '([{') - (char in ')]}')
            if not depth:
                end = i
                break
        return re.findall(r'%([\w.\-]+)', self.rest[:end])


def size(kind: str) -> int:
    """Bytes of a type, of a tuple those of all its parts."""
    total = 0
    for name, shape in _ARRAY.findall(kind):
        digits = re.search(r'\d+', name)
        bits = BITS.get(name) or (int(digits[0]) if digits else 0)
        total += math.prod(int(n) for n in shape.split(',') if n) * bits // 8
    return total


def parse(text: str) -> dict[str, list[Instruction]]:
    """{computation: its instructions}; the last one is the entry."""
    computations, current = {}, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[1], [])
        elif current is not None and (found := _LINE.match(line)):
            current.append(Instruction(*found.groups()))
    return computations


def trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often the body of a loop runs: as noted, or by its condition, i < n; else 1.

    JAX and XLA let loops count from 0 by 1.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = computations[re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]]
    constants = {x.name: x.rest.split(')')[0] for x in condition if x.opcode == 'constant'}
    for one in condition:
        if one.opcode == 'compare' and 'direction=LT' in one.rest and one.operands[1] in constants:
            return int(constants[one.operands[1]])
    return 1


def runs(computations: dict[str, list[Instruction]]) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length counts once."""
    counts = collections.Counter({list(computations)[-1]: 1})
    # Callers come behind what they call.
    for name in reversed(list(computations)):
        for instruction in computations[name]:
            times = trips(instruction, computations) if instruction.opcode == 'while' else 1
            called = _CALLED.findall(instruction.rest)
            if branches := _BRANCHES.search(instruction.rest):
                called += re.findall(r'[\w.\-]+', branches[1])
            for one in called:
                counts[one] += counts[name] * times
    return counts


def collectives(computations: dict[str, list[Instruction]]) -> dict[str, dict[str, int]]:
    """{kind: {'count', 'bytes'}} of a step: bytes of the results on a device, of a reduce-scatter
    those of its operands."""
    counts, found = runs(computations), {}
    for name, instructions in computations.items():
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            kind = one.opcode.removesuffix('-start')
            if kind not in COLLECTIVES or not counts[name]:
                continue
            moved = size(one.type)
            if one.opcode.endswith('-start') and kind != 'all-reduce':
                # A pair of operands and results.
                moved -= sum(size(types.get(operand, '')) for operand in one.operands)
            if kind == 'reduce-scatter':
                moved = sum(size(types.get(operand, '')) for operand in one.operands)
            total = found.setdefault(kind, {'count': 0, 'bytes': 0})
            total['count'] += counts[name]
            total['bytes'] += counts[name] * moved
    return found


def memory_traffic(computations: dict[str, list[Instruction]]) -> int:
    """Bytes that a device reads and writes in its main memory in a step, about: operands and
    results of every instruction, of what is sliced the slices."""
    counts = runs(computations)
    fused = {
        name
        for instructions in computations.values()
        for one in instructions
        if one.opcode == 'fusion' or 'to_apply=' in one.rest
        for name in _CALLED.findall(one.rest)
    }
    total = 0
    for name, instructions in computations.items():
        if name in fused or not counts[name]:
            continue
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            if one.opcode in FREE or one.opcode.endswith('-done'):
                continue
            reads = [size(types.get(operand, '')) for operand in one.operands]
            written = size(one.type)
            if one.opcode == 'fusion':
                inner = computations.get(_CALLED.findall(one.rest)[0], [])
                reads, written = _fusion(inner, reads, written)
            elif one.opcode == 'dynamic-slice':
                reads = [written]
            elif one.opcode == 'dynamic-update-slice':
                written = reads[1]
                reads = [written]
            total += counts[name] * (sum(reads) + written)
    return total


def _fusion(inner: list[Instruction], reads: list[int], written: int) -> tuple[list[int], int]:
    """What a fusion reads and writes, where it takes or replaces slices of its operands."""
    users = collections.defaultdict(list)
    for one in inner:
        for place, operand in enumerate(one.operands):
            users[operand].append((place, one))
    types = {one.name: one.type for one in inner}
    reads = list(reads)
    for one in inner:
        if one.opcode != 'parameter':
            continue
        number, used = int(one.rest.split(')')[0]), users[one.name]
        sliced = [user for place, user in used if user.opcode == 'dynamic-slice' and place == 0]
        updated = [u for place, u in used if u.opcode == 'dynamic-update-slice' and place == 0]
        if number < len(reads) and used and len(sliced) + len(updated) == len(used):
            reads[number] = sum(size(user.type) for user in sliced)
    root = inner[-1] if inner else None
    if root is not None and root.opcode == 'dynamic-update-slice':
        written = size(types.get(root.operands[1], ''))
    return reads, written
