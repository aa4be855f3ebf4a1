"""The plug points: every choice that is made by name, and the built-in members of each.

A configuration refers to a member by its short name, or as `package.module:factory` for a custom member
(docs/extending.md). The tables contain import paths as text, which are imported on first use, so importing this module
is cheap. To add a member to the package, write its file and add its line here.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from udddm.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


def load_plugin(name: str, what: str) -> Callable[..., Any]:
    """Import the function or class `package.module:name`. Messages call it `what`, such as "data set".

    Raises ConfigError for a malformed name, a module that cannot be imported, or an attribute that does not exist or
    is not callable. Only attributes of the module itself are accepted: `os:path.join` is an error.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier() or module_name.startswith("."):
        raise ConfigError(f"{what} {name!r}: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{what} {name!r}: there is no module {error.name}: install it, or add its folder to PYTHONPATH"
            ) from error
        raise ConfigError(f"{what} {name!r}: importing {module_name} failed: {error}") from error
    except ImportError as error:
        raise ConfigError(f"{what} {name!r}: importing {module_name} failed: {error}") from error
    if not hasattr(module, attribute):
        names = [each for each in vars(module) if not each.startswith("_")]
        match = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise ConfigError(f"{what} {name!r}: the module {module_name} has no {attribute}{hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is a {type(found).__name__}, not a function")
    factory: Callable[..., Any] = found
    return factory


def name_of(factory: Callable[..., Any] | str, what: str) -> str:
    """Returns the name by which a configuration refers to a factory that was passed from Python.

    Raises ConfigError for a lambda, a local function or an instance, which workers could not import by name.
    """
    if isinstance(factory, str):
        return factory
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    if not module or not name.isidentifier():
        raise ConfigError(
            f"{what}={factory!r}: give a function or class that is defined at the top level of a module, or its name "
            "as package.module:function; every worker imports it by that name"
        )
    return f"{_importable(module)}:{name}"


def _importable(module: str) -> str:
    """The name by which another process can import a module. For the running script, it is the name of its file."""
    script = getattr(sys.modules.get(module), "__file__", None)
    if module != "__main__" or script is None:
        return module
    spec = getattr(sys.modules[module], "__spec__", None)  # set by python -m
    stem: str = spec.name if spec is not None else Path(script).stem
    found = importlib.util.find_spec(stem) if stem.isidentifier() or spec is not None else None
    same = found is not None and found.origin is not None and Path(found.origin).resolve() == Path(script).resolve()
    return stem if same else module


def cannot_take(function: Callable[..., Any], *arguments: Any) -> str | None:
    """Why a function cannot be called with positional arguments; None if it can, or if that is unknown."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return str(error)
    except ValueError:  # a function written in C may have no signature
        return None
    return None


def takes_settings(model: type[BaseModel]) -> Callable[[Function], Function]:
    """Decorator that declares the pydantic model of the settings of a function, which receives them as its second
    argument.

    A class sets the attribute `Settings` to its model instead.
    """

    def mark(factory: Function) -> Function:
        factory.Settings = model  # type: ignore[attr-defined]
        return factory

    return mark


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One line about an error in the settings of a member."""
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] != "extra_forbidden":
        return f"{key}: {detail['msg'].removeprefix('Value error, ')}"
    names = list(model.model_fields)
    close = difflib.get_close_matches(key, names, 1, 0.6)
    return f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}")


class Registry:
    """The members of one plug point: short names, and the import paths of their factories.

    Args:
        what: what messages call a member, such as "network".
        key: the configuration key or command line option that selects a member.
        members: import path by short name.
        renamed: current short name by old short name.
    """

    def __init__(self, what: str, key: str, members: Mapping[str, str], renamed: Mapping[str, str] | None = None):
        self.what, self.key, self.members, self.renamed = what, key, dict(members), dict(renamed or {})

    def check(self, name: str) -> str:
        """Returns the current form of a name. Raises ValueError if it is neither a short name nor an import path."""
        name = self.renamed.get(name, name)
        if name in self.members or ":" in name:
            return name
        match = difflib.get_close_matches(name, [*self.members, *self.renamed], 1, 0.5)
        hint = f"did you mean {self.renamed.get(match[0], match[0])}? The choices are" if match else "the choices are"
        raise ValueError(f"unknown {self.what} {name!r}; {hint} {', '.join(self.members)}, and package.module:function")

    def is_import(self, name: str) -> bool:
        """Whether a name imports code other than a built-in member."""
        return self.renamed.get(name, name) not in self.members

    def load(self, name: str) -> Callable[..., Any]:
        """Import the factory of a member. Raises ConfigError."""
        try:
            name = self.check(name)
        except ValueError as error:
            raise ConfigError(f"{self.key}: {error}") from None
        return load_plugin(self.members.get(name, name), self.what)

    def build(self, name: str, settings: Mapping[str, Any], context: Any) -> Any:
        """Build a member: `factory(context)`, or `factory(context, settings)` if the factory has an attribute
        `Settings`, the pydantic model of its settings. A class with a classmethod `create` is built by
        calling it instead.

        Raises ConfigError, which names each key, for invalid settings.
        """
        factory = self.load(name)
        parsed = self.parse(name, factory, settings)
        create = getattr(factory, "create", factory)
        arguments = (context,) if parsed is None else (context, parsed)
        if (problem := cannot_take(create, *arguments)) is not None:
            takes = "context" if parsed is None else "context, settings"
            raise ConfigError(f"{self.key}={name}: the {self.what} is called as {name}({takes}): {problem}")
        return create(*arguments)

    def parse(self, name: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> BaseModel | None:
        """Validate the settings of a member by its model. Returns None if it has no settings. Raises ConfigError."""
        section = f"{self.key.rpartition('.')[0]}.settings"
        model = getattr(factory, "Settings", None)
        if model is None:
            if settings:
                raise ConfigError(f"{section}: the {self.what} {name} takes no settings; remove {', '.join(settings)}")
            return None
        if not (inspect.isclass(model) and issubclass(model, BaseModel)):
            raise ConfigError(f"the {self.what} {name}: its attribute Settings must be a pydantic model")
        try:
            return model.model_validate(dict(settings))
        except ValidationError as error:
            lines = [f"{section}.{_explain(each, model)}" for each in error.errors()]
            head = f"the {self.what} {name}:"
            raise ConfigError(f"{head} {lines[0]}" if len(lines) == 1 else "\n  ".join([head, *lines])) from None


STORES = Registry(
    "x0-state store",
    "store.kind",
    {
        "none": "udddm.store.none:NoStore",
        "gpu": "udddm.store.device:DeviceStore",
        "pinned": "udddm.store.pinned:PinnedStore",
        "zarr": "udddm.store.zarr:ZarrStore",
    },
)
OBJECTIVES = Registry(
    "objective",
    "objective.name",
    {
        "chain": "udddm.objectives.chain:Chain",
        "ict": "udddm.objectives.ict:ICT",
        "ect": "udddm.objectives.ect:ECT",
        "edm": "udddm.objectives.edm:EDM",
        "uddm": "udddm.objectives.uddm:UDDM",
    },
    renamed={"consistency": "ict", "tuning": "ect", "denoiser": "edm", "algorithm-1": "uddm"},
)
NETWORKS = Registry(
    "network",
    "network.name",
    {
        "unet": "udddm.networks.unet:build",
        "dit": "udddm.networks.dit:DiT",
        "ddpmpp": "udddm.networks.ddpmpp:DDPMpp",
    },
)
SCHEDULES = Registry(
    "noise schedule",
    "schedule.kind",
    {
        "ve": "udddm.diffusion.schedule:VarianceExploding",
        "vp": "udddm.diffusion.schedule:VariancePreserving",
    },
)
SAMPLERS = Registry(
    "sampler",
    "sample.sampler",
    {
        "renoise": "udddm.diffusion.samplers:renoise",
        "algorithm-2": "udddm.diffusion.samplers:algorithm_2",
        "heun": "udddm.diffusion.samplers:heun",
    },
)
ENGINES = Registry(
    "engine",
    "engine.name",
    {
        "torch": "udddm.backends.engines.ddp:TorchEngine",
        "deepspeed": "udddm.backends.engines.deepspeed:DeepSpeedEngine",
    },
)
LAUNCHERS = Registry(
    "launcher",
    "--backend",
    {
        "local": "udddm.backends.launchers.local:Processes",
        "ray": "udddm.backends.launchers.ray_train:RayTrain",
    },
)
METRICS = Registry(
    "metric",
    "evaluate.metrics",
    {
        "frechet": "udddm.evaluation.metrics:frechet_metric",
        "kid": "udddm.evaluation.metrics:kid_metric",
        "precision-recall": "udddm.evaluation.metrics:precision_recall_metric",
        "spread": "udddm.evaluation.metrics:spread_metric",
        "inception-score": "udddm.evaluation.metrics:inception_score_metric",
    },
    renamed={"fid": "frechet"},
)
LOGGERS = Registry(
    "logger",
    "loggers",
    {
        "tensorboard": "udddm.training.loggers.tensorboard:TensorBoard",
        "wandb": "udddm.training.loggers.wandb:WeightsAndBiases",
        "mlflow": "udddm.training.loggers.mlflow:MLflow",
    },
)
