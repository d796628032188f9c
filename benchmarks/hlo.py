"""What a compiled step launches on a GPU, read from XLA's optimized module.

The module is a protocol buffer whose definition is part of TensorFlow.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re

from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

# These launch nothing.
SILENT = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# These frames do not say whose code it is.
NEUTRAL = SILENT | {"broadcast", "iota"}
# These compute an element from many elements, or may read elements more than once. All others
# compute each element from one element per operand.
OF_MANY = {"convolution", "dot", "gather", "reduce", "reduce-window", "scatter", "sort"}
# These read a part of an operand.
TAKES_PART = {"dynamic-slice", "gather", "slice"}
SCALING, KERAS, MODEL, OPTIMIZER = "scaling", "Keras's loss scale", "model", "inner optimizer"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        kind: The opcode of XLA, or the target of a custom call.
        computation: Name of the computation that launches it.
        owners: Whose code it computes: dict from pairs of one of `SCALING`, `KERAS`, `MODEL`,
            `OPTIMIZER` and a function to the number of instructions.
        bytes: Bytes read and written.
    """

    kind: str
    computation: str
    owners: collections.Counter
    bytes: int

    @property
    def is_copy(self):
        return self.kind.startswith("copy")

    @property
    def is_of_scaling(self):
        """Whether all of its code belongs to loss scaling."""
        return {whose for whose, _ in self.owners} == {SCALING}


class Program:
    """A compiled step.

    Args:
        serialized: Bytes of a `HloModuleProto`.
    """

    def __init__(self, serialized):
        self._module = hlo_pb2.HloModuleProto.FromString(serialized)
        self._computations = {each.id: each for each in self._module.computations}
        self._frames = self._module.stack_frame_index
        entry = self._computations[self._module.entry_computation_id]
        self.kernels = list(self._launched(entry))

    @property
    def conditionals(self):
        return [kernel for kernel in self.kernels if kernel.kind == "conditional"]

    def _launched(self, computation):
        """All kernels. Of the two branches of a conditional, those of the longer one."""
        instructions = {each.id: each for each in computation.instructions}
        for each in computation.instructions:
            called = [self._computations[i] for i in each.called_computation_ids]
            if each.opcode in SILENT or each.opcode.endswith("-done"):
                continue
            if each.opcode == "call":
                yield from self._launched(called[0])
                continue
            yield self._kernel(each, instructions, computation, called)
            if each.opcode == "conditional":
                yield from max((list(self._launched(branch)) for branch in called), key=len)
            elif each.opcode == "while":
                for part in called:
                    yield from self._launched(part)

    def _kernel(self, instruction, instructions, computation, called):
        inside = list(called[0].instructions) if instruction.opcode == "fusion" else [instruction]
        told = [each for each in inside if each.opcode not in NEUTRAL and self._frame(each)]
        told = told or [each for each in inside if self._frame(each)] or [instruction]
        kind = instruction.custom_call_target or instruction.opcode
        return Kernel(
            kind,
            computation.name,
            collections.Counter(self._owner(self._frame(each)) for each in told),
            0 if kind in ("conditional", "while") else _moved(instruction, instructions, inside),
        )

    @staticmethod
    def _frame(instruction):
        return instruction.metadata.stack_frame_id

    @functools.cache  # noqa: B019
    def _owner(self, frame):
        """Whose code made an instruction, by the innermost informative stack frame."""
        while frame:
            at = self._frames.stack_frames[frame - 1]
            location = self._frames.file_locations[at.file_location_id - 1]
            path = pathlib.PurePath(self._frames.file_names[location.file_name_id - 1])
            function = self._frames.function_names[location.function_name_id - 1]
            named = [part for part in function.split(".") if not part.startswith("<")]
            owner = _owner_of(path, (named or ["module"])[-1])
            if owner is not None:
                return owner
            frame = at.parent_frame_id
        return MODEL, "other"


def _owner_of(path, function):
    name = f"{path.stem}.{function}"
    if "tf_adaptive_ls" in path.parts and "benchmarks" not in path.parts:
        if path.stem in ("companion", "functional_call", "planned_call"):
            return MODEL, "other"  # where a layer runs
        return (OPTIMIZER, name) if function == "_apply_inner" else (SCALING, name)
    text = path.as_posix()
    if "/keras/src/optimizers/" in text:
        return (KERAS if path.stem == "loss_scale_optimizer" else OPTIMIZER), name
    if any(f"/keras/src/{part}/" in text for part in ("layers", "losses", "metrics")):
        return MODEL, name
    return None


def _moved(instruction, instructions, inside):
    """Bytes read and written. Where only a part of an operand is read, the part."""
    total = _size(instruction.shape)
    one_of_each = len(inside) > 1 and not OF_MANY & {each.opcode for each in inside}
    parameters = {each.parameter_number: each for each in inside if each.opcode == "parameter"}
    for number, operand in enumerate(instruction.operand_ids):
        shape = instructions[operand].shape
        size = _size(shape)
        if one_of_each and not shape.tuple_shapes:
            size = min(size, _elements(instruction.shape) * _bytes_of(shape.element_type))
        if number in parameters:
            users = list(_users(parameters[number].id, inside))
            if users and all(user.opcode in TAKES_PART for user in users):
                size = min(size, sum(_size(user.shape) for user in users))
        total += size
    return total


def _users(number, inside):
    for each in inside:
        if number in each.operand_ids:
            if each.opcode == "bitcast":
                yield from _users(each.id, inside)
            else:
                yield each


def _size(shape):
    if shape.tuple_shapes:
        return sum(map(_size, shape.tuple_shapes))
    return _elements(shape) * _bytes_of(shape.element_type)


def _elements(shape):
    """The number of elements, of a tuple in total."""
    return sum(map(_elements, shape.tuple_shapes)) or math.prod(shape.dimensions)


@functools.cache
def _bytes_of(element_type):
    name = xla_data_pb2.PrimitiveType.Name(element_type)
    bits = re.search(r"\d+", name)
    if name in ("TOKEN", "TUPLE", "OPAQUE_TYPE"):
        return 0
    return 1 if bits is None else max(1, int(bits[0]) // 8)


def launches(dumped):
    """What the host does in a step: counts of graph launches, kernel launches, and other commands.

    Kernel launches are those outside of graphs.

    Args:
        dumped: The text in which XLA dumps the final sequence of thunks.
    """
    found, inside = collections.Counter(), None
    for line in dumped.splitlines():
        thunk = re.match(r"( *)\d+: (k\w+)", line)
        if thunk is None or (inside is not None and len(thunk[1]) > inside):
            continue
        inside = len(thunk[1]) if thunk[2] == "kCommandBuffer" else None
        found[thunk[2]] += 1
    return dict(found)
