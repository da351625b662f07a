"""What is patched by tests: one class, with a function of every kind."""

from __future__ import annotations


class Parent:
    def inherited(self, value):
        return value


class Class(Parent):
    def method(self, value):
        return value

    @classmethod
    def build(cls, value):
        return cls, value

    @staticmethod
    def double(value):
        return 2 * value


def negated(wrapped, instance, args, kwargs):
    """A wrapper whose work is seen in any of the results."""
    result = wrapped(*args, **kwargs)
    return (result[0], -result[1]) if isinstance(result, tuple) else -result


NAMES = ("method", "inherited", "build", "double")


def results():
    """What each of the class's functions makes of 1."""
    instance = Class()
    return instance.method(1), instance.inherited(1), Class.build(1), Class.double(1)


PLAIN, PATCHED = (1, 1, (Class, 1), 2), (-1, -1, (Class, -1), -2)
