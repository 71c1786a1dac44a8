"""The walk of a model's values sees a change wherever Python code may read it."""

import array
import collections
import configparser
import contextvars
import functools
import itertools
import os
import sys
import threading
import types
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyroelbo.compiled.environment import Environment, Untraceable
from tests.compiled.cases import follow, nothing

LEVEL = 1.0


def write_level(v):
    global LEVEL
    LEVEL = v


@pytest.fixture(autouse=True)
def level():
    write_level(1.0)


def chain_map():
    values = collections.ChainMap({"a": 1.0}, {})
    return lambda: values["a"], lambda v: values.update(a=v)


def user_dict():
    values = collections.UserDict(a=1.0)
    return lambda: values["a"], lambda v: values.update(a=v)


def mapping_proxy():
    inner = {"a": 1.0}
    values = types.MappingProxyType(inner)
    return lambda: values["a"], lambda v: inner.update(a=v)


def numbers():
    values = array.array("d", [1.0])
    return lambda: values[0], lambda v: values.__setitem__(0, v)


def some_bytes():
    values = bytearray(b"\x01")
    return lambda: values[0], lambda v: values.__setitem__(0, int(v))


def of_a_thread():
    values = threading.local()
    values.a = 1.0
    return lambda: values.a, lambda v: setattr(values, "a", v)


def of_a_context():
    value = contextvars.ContextVar("value", default=1.0)
    return value.get, value.set


def configuration():
    values = configparser.ConfigParser()
    values["training"] = {"weight": "1.0"}
    return (
        lambda: float(values["training"]["weight"]),
        lambda v: values["training"].update(weight=str(v)),
    )


class Thing:
    def __init__(self):
        self.a = 1.0


def weak_reference():
    thing = Thing()
    reference = weakref.ref(thing)
    return lambda: reference().a, lambda v: setattr(thing, "a", v)


def bound_method_of_a_dict():
    values = {"a": 1.0}
    get = values.get
    return lambda: get("a"), lambda v: values.update(a=v)


def cached_function():
    values = [1.0]

    @functools.lru_cache
    def read():
        return values[0]

    return lambda: read(), lambda v: (values.__setitem__(0, v), read.cache_clear())


class Options(dict):
    pass


def attribute_of_a_dict():
    options = Options(b=1.0)
    options.a = 1.0
    return lambda: options.a, lambda v: setattr(options, "a", v)


class Pair(collections.namedtuple("Pair", "x")):
    def level(self):
        return self.x * LEVEL


def global_in_a_method_of_a_tuple():
    pair = Pair(1.0)
    return lambda: pair.level(), write_level


class Scaled:
    def __getitem__(self, i):
        return LEVEL


def global_in_a_special_method():
    thing = Scaled()
    return lambda: thing[0], write_level


def module_as_a_value():
    settings = types.ModuleType("settings_as_a_value")
    settings.level = 1.0
    holder = {"settings": settings}
    return lambda: holder["settings"].level, lambda v: setattr(settings, "level", v)


outer = types.ModuleType("outer_of_test_environment")
outer.inner = types.ModuleType("outer_of_test_environment.inner")
sys.modules["outer_of_test_environment"] = outer


def module_in_a_module():
    outer.inner.level = 1.0
    return lambda: outer.inner.level, lambda v: setattr(outer.inner, "level", v)


def import_inside():
    outer.level = 1.0

    def read():
        import outer_of_test_environment

        return outer_of_test_environment.level

    return read, lambda v: setattr(outer, "level", v)


def attribute_by_its_name():
    outer.level = 1.0
    return lambda: getattr(outer, "level"), lambda v: setattr(outer, "level", v)  # noqa: B009


def global_by_its_name():
    return lambda: globals()["LEVEL"], write_level


def code_without_a_module():
    space = {"LEVEL": 1.0}
    exec("def read():\n    return LEVEL", space)  # its module is builtins
    return space["read"], lambda v: space.update(LEVEL=v)


def changed_beside_a_shorter_list():
    thing = types.SimpleNamespace(a=1.0, values=[0.5, 1.0])
    return lambda: thing.a + len(thing.values), lambda v: (thing.values.pop(), setattr(thing, "a", v + 2))


def environment_variable():
    os.environ["LEVEL_OF_TEST_ENVIRONMENT"] = "1.0"
    return (
        lambda: float(os.environ["LEVEL_OF_TEST_ENVIRONMENT"]),
        lambda v: os.environ.update(LEVEL_OF_TEST_ENVIRONMENT=str(v)),
    )


@pytest.mark.parametrize(
    "place",
    [
        *(chain_map, user_dict, mapping_proxy, numbers, some_bytes, of_a_thread, of_a_context, configuration),
        *(weak_reference, bound_method_of_a_dict, cached_function, attribute_of_a_dict),
        *(global_in_a_method_of_a_tuple, global_in_a_special_method, module_as_a_value, module_in_a_module),
        *(import_inside, attribute_by_its_name, environment_variable, global_by_its_name),
        *(code_without_a_module, changed_beside_a_shorter_list),
    ],
)
def test_no_place_of_a_value_is_overlooked(place):
    read, write = place()
    before = read()
    environment = Environment([lambda: read()])
    assert environment.holds()
    write(2.0)
    assert read() != before
    assert not environment.holds()


def test_a_refused_run_is_undone():
    class Holder:
        shared = 1

    holder, cell, tensor, history = Holder(), 1.0, torch.zeros(()), [1.0]
    holder.own = holder.tensor = tensor  # at two places
    holder.history, holder.options = history, {"a": 1.0}

    def read():
        return cell, holder.options, holder.history

    def run():
        nonlocal cell
        cell, Holder.shared, holder.tensor = 2.0, 2, torch.ones(())
        history.append(2.0)
        holder.options["a"] = 2.0

    environment = Environment([read])
    run()
    assert environment.forgive() is not None
    environment.restore()
    assert environment.holds()
    assert (cell, Holder.shared, history, holder.options) == (1.0, 1, [1.0], {"a": 1.0})
    assert holder.tensor is tensor


def test_iterators_matter_only_where_the_code_takes_their_items():
    counter = itertools.count()
    assert Environment([lambda: counter]).holds()
    with pytest.raises(Untraceable, match="iterator 'counter'"):
        Environment([lambda: next(counter)])


def tied_attributes():
    thing = types.SimpleNamespace(a=torch.tensor(0.5))
    thing.b = thing.a

    def change(i):
        if i in (4, 8):
            setattr(thing, "ba"[i == 8], torch.tensor(0.1 * i))

    return lambda: thing.a - 2 * thing.b, change


def tied_closures():
    a = b = torch.tensor(0.5)

    def change(i):
        nonlocal a, b
        if i == 4:
            b = torch.tensor(0.4)
        if i == 8:
            a = torch.tensor(0.8)

    return lambda: a - 2 * b, change


def tied_weights():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    second.weight = first.weight

    def change(i):
        if i in (4, 8):
            (second if i == 4 else first).weight = nn.Parameter(torch.full((1, 1), 0.1 * i))

    return lambda: (first(torch.ones(1)) - 2 * second(torch.ones(1))).squeeze(), change


def weight_of_the_module_alone():
    module = nn.Linear(1, 1)

    def read():
        pyro.module("module", module)  # the store keeps the weight that it has seen first
        return module(torch.ones(1)).squeeze()

    def change(i):
        if i == 4:
            module.weight = nn.Parameter(torch.full((1, 1), 0.4))

    return read, change


@pytest.mark.parametrize(
    "tied",
    [tied_attributes, tied_closures, tied_weights, weight_of_the_module_alone],
    ids=lambda f: f.__name__,
)
def test_one_tensor_at_two_places_may_become_two(tied):
    pyro.clear_param_store()
    read, change = tied()

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + read(), 1.0), obs=y)

    loss = follow(model, nothing, [(torch.tensor(0.5),)] * 12, before=change)
    assert loss.counters.fallbacks == 0
    assert loss.counters.compiled_calls >= 9


def test_a_parameter_with_another_constraint_needs_another_graph():
    pyro.clear_param_store()
    store = pyro.get_param_store()

    def model(y):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        pyro.sample("y", dist.Normal(scale, 1.0), obs=y)

    def change(i):
        if i == 4:
            del store["scale"]
            pyro.param("scale", torch.tensor(0.6), constraint=constraints.interval(0.0, 2.0))

    follow(model, nothing, [(torch.tensor(0.5),)] * 8, before=change)
