"""What a gateway is told at its construction."""

import inspect
from typing import get_type_hints

import pytest

from starlette_aigateway import AIGateway, ConfigurationError
from starlette_aigateway.composition import Composition
from starlette_aigateway.settings import STORES, SettingFields


def test_an_argument_that_there_is_not_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigurationError, match=r"no argument 'provider'; did you mean 'providers'\?$") as caught:
        AIGateway.in_memory(provider=[])  # type: ignore[call-arg]  # the mistake that is made
    assert caught.value.param == "provider"


def test_a_gateway_in_memory_takes_no_directory() -> None:
    with pytest.raises(ConfigurationError) as caught:
        AIGateway.in_memory(data_dir="somewhere")
    assert caught.value.param == "data_dir"


def test_the_arguments_of_a_gateway_are_all_that_a_composition_is_made_from() -> None:
    taken = inspect.signature(Composition).parameters.keys() - {"tap"}
    assert taken == SettingFields.__annotations__.keys()


def test_what_is_kept_somewhere_is_known_as_a_store() -> None:
    seams = {name for name, given in get_type_hints(SettingFields).items() if "Store" in str(given) or "limits.aio" in str(given)}
    assert seams | {"ledger", "responses"} == STORES.keys()
