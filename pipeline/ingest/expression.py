"""A filter in words in, an Arrow expression out: `similarity >= 0.3 and language == "en"`.

The text is parsed as a Python expression and only what is listed here is understood, so nothing in it is ever run.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at run time, and no type checker sees them

MAX_LENGTH = 10_000

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": pc.min_element_wise,
    "max": pc.max_element_wise,
    "length": pc.utf8_length,
}
GRAMMAR = "and, or, not, in, is None, == != < <= > >=, + - * /, min(), max(), length(), numbers, strings, column names"


class Filter:
    """A condition on the columns of a table. Raises ValueError in one line where the text is none.

    A comparison with a missing value is neither true nor false, and a row is taken only where the whole is true.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > MAX_LENGTH:
            raise ValueError(f"filter of {len(text):,} characters; the limit is {MAX_LENGTH:,}")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
            raise ValueError(f'filter "{text}" cannot be read ({reason}); it may hold: {GRAMMAR}') from None
        names: dict[str, None] = {}

        def named(name: str) -> Any:
            names[name] = None
            return pc.field(name)

        _build(self._tree, named, self._refuse)
        self.names = tuple(names)
        """Of the columns that it looks at, in the order of the text."""
        if not self.names:
            raise ValueError(f'filter "{text}" looks at no column')

    def bind(self, schema: Any, columns: Mapping[str, str]) -> Any:
        """Returns the expression for a table of this schema; columns: name in the text -> name in the table.

        Raises ValueError where the types do not fit.
        """
        built = _build(self._tree, _fields(columns), self._refuse)
        try:
            empty = schema.empty_table()
            empty.filter(built)
        except (pa.ArrowException, TypeError) as error:
            types = ", ".join(f"{name}: {schema.field(columns[name]).type}" for name in self.names)
            reason = str(error).splitlines()[0]
            raise ValueError(f'filter "{self._text}" does not fit the columns ({types}): {reason}') from None
        return built

    def _refuse(self, node: ast.AST) -> ValueError:
        part = ast.get_source_segment(self._text.strip(), node) or type(node).__name__  # type: ignore[arg-type]
        return ValueError(f'filter "{self._text}": "{part}" is not understood; it may hold: {GRAMMAR}')


def _build(node: ast.AST, field: Callable[[str], Any], refuse: Callable[[ast.AST], ValueError]) -> Any:
    def build(part: ast.AST) -> Any:
        return _build(part, field, refuse)

    match node:
        case ast.BoolOp(op, values):
            return reduce(operator.and_ if isinstance(op, ast.And) else operator.or_, map(build, values))
        case ast.UnaryOp(ast.Not(), operand):
            return ~_expression(build(operand))
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in (int, float):
            return pc.scalar(-value)  # type: ignore[operator]
        case ast.Compare(left, ops, comparators):
            sides = [left, *comparators]
            parts = [_compare(sides[i], op, sides[i + 1], build, refuse) for i, op in enumerate(ops)]
            return reduce(operator.and_, parts)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](build(left), build(right))
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS and arguments:
            return _FUNCTIONS[name](*map(build, arguments))
        case ast.Name(name):
            return field(name)
        case ast.Constant(value) if type(value) in (int, float, str, bool):
            return pc.scalar(value)
        case _:
            raise refuse(node)


def _compare(
    left: ast.AST, op: ast.cmpop, right: ast.AST, build: Callable[[ast.AST], Any], refuse: Callable[[ast.AST], Any]
) -> Any:
    match op, right:
        case ast.In() | ast.NotIn(), ast.Tuple(elements) | ast.List(elements) | ast.Set(elements):
            found = _expression(build(left)).isin(_constants(elements, refuse))
            return found if isinstance(op, ast.In) else ~found
        case ast.Is(), ast.Constant(None):
            return _expression(build(left)).is_null()
        case ast.IsNot(), ast.Constant(None):
            return _expression(build(left)).is_valid()
        case _ if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](build(left), build(right))
        case _:
            raise refuse(right)


def _constants(elements: Sequence[ast.expr], refuse: Callable[[ast.AST], Any]) -> list[Any]:
    for element in elements:
        if not (isinstance(element, ast.Constant) and type(element.value) in (int, float, str)):
            raise refuse(element)
    return [element.value for element in elements if isinstance(element, ast.Constant)]


def _fields(columns: Mapping[str, str]) -> Callable[[str], Any]:
    def field(name: str) -> Any:
        return pc.field(columns[name])

    return field


def _expression(value: Any) -> Any:
    assert isinstance(value, pc.Expression)
    return value
