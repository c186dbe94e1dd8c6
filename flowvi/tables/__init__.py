"""Tables: the joint distribution of columns of every kind."""

from flowvi.tables.columns import Angle, Category, Constant, Integer, Real, Schema
from flowvi.tables.encoding import Encoder
from flowvi.tables.family import Table, table

__all__ = [
    "Angle",
    "Category",
    "Constant",
    "Encoder",
    "Integer",
    "Real",
    "Schema",
    "Table",
    "table",
]
