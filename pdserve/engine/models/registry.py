"""Which class serves a model: by the architecture that its `config.json` names.

A family is a line here, or an entry point of the group `pdserve.models` in any installed distribution:

    [project.entry-points."pdserve.models"]
    MyModelForCausalLM = "my_package.my_module:MyModel"

The class is a `ModelConfig` (`pdserve.engine.models.config`). What is built in is not replaced by an entry point.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pdserve.engine.models.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model_fields import error

GROUP = "pdserve.models"
_FAMILIES = "pdserve.engine.models."
_BUILT_IN = {
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Mistral",
    "Qwen2ForCausalLM": "qwen2:Qwen2",
    "Qwen3ForCausalLM": "qwen3:Qwen3",
    "GPT2LMHeadModel": "gpt2:Gpt2",
}


def architectures() -> list[str]:
    """All that can be served, by name."""
    return [*_BUILT_IN, *sorted({each.name for each in entry_points(group=GROUP)} - _BUILT_IN.keys())]


def describe(data: Mapping[str, Any]) -> ModelConfig:
    """What `config.json`, as plain data, says to the family that it names.

    Raises:
        ConfigError: no family is known by this name, or it can't serve the model; `param` names the field.
    """
    entry = _entry(data)
    try:
        family = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"architectures: {entry.name}: {entry.value}: {error}", "architectures") from error
    if not (isinstance(family, type) and issubclass(family, ModelConfig)):
        raise ConfigError(f"architectures: {entry.name}: {entry.value} is no ModelConfig", "architectures")
    return family.read({**data, "architectures": [entry.name]})


def _entry(data: Mapping[str, Any]) -> EntryPoint:
    names = data.get("architectures") or []
    for name in names:
        if name in _BUILT_IN:
            return EntryPoint(name, _FAMILIES + _BUILT_IN[name], GROUP)
        found = entry_points(group=GROUP, name=str(name))
        if len(found) > 1:
            owners = ", ".join(sorted(each.dist.name for each in found if each.dist is not None))
            raise ConfigError(f"architectures: {name} is served by several distributions: {owners}", "architectures")
        for each in found:
            return each
    got = ", ".join(map(str, names)) or "nothing"
    raise error("architectures", f"allowed: {', '.join(architectures())}; got {got}")
