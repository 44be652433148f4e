"""What the bytecode of a function says about it, before it runs: the globals it reads, and what no
graph of tensor operations can do.
"""

import dis
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

_IMPORTS = ("torch", "math", "typing", "collections")
_QUESTIONS = {  # of a tensor or an object, that a symbol would answer for itself
    "type": "asks type()",
    "callable": "asks callable()",
}
_EFFECTS = (
    "print", "input", "open", "exec", "eval", "compile", "globals", "locals", "vars", "dir", "id",
    "breakpoint", "__import__", "delattr", "memoryview",
)  # fmt: skip
_CHAIN = ("LOAD_ATTR", "LOAD_METHOD")


@dataclass(frozen=True)
class Facts:
    """What the bytecode of one code object says."""

    refusal: str | None  # what a graph cannot do, as the end of "forward ..."
    reads: tuple[tuple[str, ...], ...]  # globals, with the attributes that are read of them
    frees: tuple[str, ...]  # names of an enclosing function's variables
    inner: tuple[CodeType, ...]  # functions it makes


@lru_cache(maxsize=4096)
def facts_of(code: CodeType) -> Facts:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "COPY")]
    reads = []
    for at, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = [step.argval]
            for following in steps[at + 1 :]:
                if following.opname not in _CHAIN:
                    break
                chain.append(following.argval)
            reads.append(tuple(chain))
    inner = tuple(const for const in code.co_consts if isinstance(const, CodeType))
    return Facts(_refusal(code, steps), tuple(dict.fromkeys(reads)), code.co_freevars, inner)


def _refusal(code: CodeType, steps: list[dis.Instruction]) -> str | None:
    handlers = 0
    for step in steps:
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"sets the global {step.argval}"
        if step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars:
            return f"sets {step.argval} of an enclosing function"
        if step.opname == "IMPORT_NAME" and str(step.argval).partition(".")[0] not in _IMPORTS:
            return f"imports {step.argval}"
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if step.argval in _QUESTIONS:
                return _QUESTIONS[step.argval]
            if step.argval in _EFFECTS:
                return f"calls {step.argval}()"
        handlers += (step.opname == "PUSH_EXC_INFO") - (step.opname == "WITH_EXCEPT_START")
        if step.opname == "CHECK_EXC_MATCH":
            return "catches exceptions"
    return "catches exceptions" if handlers > 0 else None
