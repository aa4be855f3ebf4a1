"""Plug points: members by name, old names, custom factories, and their settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from udddm.config import load_config, plugins
from udddm.config.plugins import Registry, load_plugin, name_of
from udddm.errors import ConfigError

HERE = __name__
NOT_A_FUNCTION = 3


def plain(context: Any) -> tuple[str, Any]:
    return "plain", context


class Made:
    """Built by its constructor."""

    def __init__(self, context: Any):
        self.context = context


class Created:
    """Built by `create`, with settings."""

    class Settings(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int = Field(gt=0)
        names: list[str] = []

    def __init__(self, context: Any, size: int):
        self.context, self.size = context, size

    @classmethod
    def create(cls, context: Any, settings: Settings) -> Created:
        return cls(context, settings.size)


def with_wrong_settings(context: Any) -> None: ...


with_wrong_settings.Settings = dict  # type: ignore[attr-defined]

MEMBERS = {"plain": f"{HERE}:plain", "made": f"{HERE}:Made", "created": f"{HERE}:Created", "wrong": f"{HERE}:Nothing"}
SHAPES = Registry("shape", "section.shape", MEMBERS, renamed={"simple": "plain"})
REGISTRIES = [value for value in vars(plugins).values() if isinstance(value, Registry)]


@pytest.mark.parametrize(
    ("name", "suggested"), [("plian", "plain"), ("creatd", "created"), ("simpel", "plain"), ("maed", "made")]
)
def test_an_unknown_name_is_reported_with_the_closest_and_all_names(name: str, suggested: str) -> None:
    expected = (
        rf"unknown shape '{name}'; did you mean {suggested}\? "
        "The choices are plain, made, created, wrong, and package.module:function"
    )
    with pytest.raises(ValueError, match=expected):
        SHAPES.check(name)
    with pytest.raises(ConfigError, match=f"section.shape: {expected}"):
        SHAPES.load(name)


def test_a_name_without_a_close_match_is_reported_with_all_names() -> None:
    with pytest.raises(
        ValueError, match=r"unknown shape 'zzz'; the choices are plain, made, created, wrong, and package"
    ):
        SHAPES.check("zzz")


def test_an_old_name_becomes_the_current_one() -> None:
    assert SHAPES.check("simple") == "plain"
    assert SHAPES.load("simple") is plain


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("objective.name", "chian", r"objective.name: unknown objective 'chian'; did you mean chain\?"),
        ("network.name", "unett", r"network.name: unknown network 'unett'; did you mean unet\?"),
        ("schedule.kind", "vpe", r"schedule.kind: unknown noise schedule 'vpe'; did you mean vp\?"),
        ("store.kind", "pined", r"store.kind: unknown x0-state store 'pined'; did you mean pinned\?"),
        ("engine.name", "deepspede", r"engine.name: unknown engine 'deepspede'; did you mean deepspeed\?"),
        ("sample.sampler", "hune", r"sample.sampler: unknown sampler 'hune'; did you mean heun\?"),
        ("evaluate.metrics", "[freche]", r"evaluate.metrics.0: unknown metric 'freche'; did you mean frechet\?"),
    ],
)
def test_a_configuration_names_the_key_of_an_unknown_member(key: str, wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"{key}={wrong}"])


@pytest.mark.parametrize(
    ("old", "new"), [("consistency", "ict"), ("tuning", "ect"), ("denoiser", "edm"), ("algorithm-1", "uddm")]
)
def test_an_objective_of_an_old_name_is_the_new_one(old: str, new: str) -> None:
    assert load_config(None, [f"objective.name={old}"]) == load_config(None, [f"objective.name={new}"])


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_every_member_of_the_package_can_be_loaded(registry: Registry) -> None:
    if "ray" in registry.members:
        pytest.importorskip("ray")
    for name in registry.members:
        assert callable(registry.load(name)), name
    assert set(registry.renamed.values()) <= set(registry.members)
    assert not set(registry.renamed) & set(registry.members)


def test_a_function_and_a_class_are_called_with_the_context_and_a_create_before_either() -> None:
    context = SimpleNamespace()
    assert SHAPES.build("plain", {}, context) == ("plain", context)
    made = SHAPES.build("made", {}, context)
    assert isinstance(made, Made) and made.context is context
    created = SHAPES.build("created", {"size": 3}, context)
    assert isinstance(created, Created) and created.context is context and created.size == 3


def test_a_custom_factory_is_built_by_its_import_path() -> None:
    assert SHAPES.check(f"{HERE}:plain") == f"{HERE}:plain"
    assert SHAPES.build(f"{HERE}:Created", {"size": 2}, None).size == 2
    assert SHAPES.build(f"{HERE}:plain", {}, 5) == ("plain", 5)


def test_every_refused_setting_is_named_by_its_key() -> None:
    with pytest.raises(ConfigError) as caught:
        SHAPES.build("created", {"size": 0, "names": ["a", 3], "color": "red"}, None)
    first, *lines = str(caught.value).splitlines()
    assert first == "the shape created:"
    keys = ["section.settings.size", "section.settings.names.1", "section.settings.color"]
    assert [line.strip().split(": ")[0] for line in lines] == keys
    with pytest.raises(ConfigError, match=r"section.settings.size: Field required"):
        SHAPES.build("created", {}, None)


@pytest.mark.parametrize(("given", "meant"), [("sise", "did you mean size?"), ("color", "it has size, names")])
def test_a_misspelled_setting_is_one_line_with_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SHAPES.build("created", {"size": 1, given: 1}, None)
    assert str(caught.value) == f"the shape created: section.settings.{given}: unknown key; {meant}"


def no_context() -> None:
    raise AssertionError


def test_a_member_that_cannot_be_called_with_a_context_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"section\.shape=.*no_context: the shape is called as .*no_context\(context\)"
    ):
        SHAPES.build(f"{HERE}:no_context", {}, None)


def test_settings_for_a_member_without_any_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"section.settings: the shape plain takes no settings; remove size, color"):
        SHAPES.build("plain", {"size": 1, "color": "red"}, None)


def test_settings_must_be_described_by_a_pydantic_model() -> None:
    with pytest.raises(ConfigError, match=r"its attribute Settings must be a pydantic model"):
        SHAPES.build(f"{HERE}:with_wrong_settings", {}, None)


@pytest.mark.parametrize("name", ["", "os", "os:", ":join", "os:path.join", "os:path:join", ".near:thing", "os:a b"])
def test_a_malformed_import_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"write package.module:function"):
        load_plugin(name, "shape")


@pytest.mark.parametrize(
    ("name", "missing"), [("no_such_package:f", "no_such_package"), ("udddm.no_such.one:f", "udddm.no_such")]
)
def test_a_missing_module_is_named_with_a_remedy(name: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no module {missing}: install it, or add its folder to PYTHON"):
        load_plugin(name, "shape")


def test_a_failing_import_inside_a_module_is_distinguished_from_a_missing_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_without_its_needs.py").write_text("import no_such_package\n")
    (tmp_path / "plugin_of_another_version.py").write_text("from udddm.errors import NoSuchError\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("plugin_without_its_needs", "plugin_of_another_version"):
        with pytest.raises(ConfigError, match=f"importing {module} failed: .*(no_such_package|NoSuchError)"):
            load_plugin(f"{module}:f", "shape")


def test_an_attribute_that_is_missing_or_not_callable_is_named() -> None:
    with pytest.raises(ConfigError, match=rf"the module {HERE} has no Creatd; did you mean Created\?"):
        load_plugin(f"{HERE}:Creatd", "shape")
    with pytest.raises(ConfigError, match=r"NOT_A_FUNCTION' is a int, not a function"):
        load_plugin(f"{HERE}:NOT_A_FUNCTION", "shape")
    with pytest.raises(ConfigError, match=rf"shape '{HERE}:Nothing': the module {HERE} has no Nothing"):
        SHAPES.load("wrong")


def test_a_factory_from_python_is_named_by_its_module() -> None:
    assert name_of(plain, "shape") == f"{HERE}:plain" and name_of("made", "shape") == "made"
    assert load_plugin(name_of(Created, "shape"), "shape") is Created

    def local(context: Any) -> None: ...

    for unnamed in (local, lambda context: None, Created.create, Made(1)):
        with pytest.raises(ConfigError, match=r"defined at the top level of a module"):
            name_of(unnamed, "shape")  # type: ignore[arg-type]
