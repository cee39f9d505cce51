"""Run files: extending, overriding, strictness, and messages a person can act on."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsr_scale.base.errors import InputError
from dsr_scale.config.load import dump_run, load_run, merge, parse_overrides, parse_run
from dsr_scale.config.presets import with_preset
from dsr_scale.config.problems import ConfigError
from dsr_scale.config.run import RunConfig
from dsr_scale.config.training import ema_name

MINIMAL = """
name: t
directory: runs/t
data: {shards: shards}
model: {width: 64, depth: 2, heads: 4}
"""


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write(tmp_path, "run.yaml", MINIMAL)


def problems_of(path: Path, overrides: list[str] | None = None) -> list[InputError]:
    with pytest.raises(InputError) as caught:
        load_run(path, overrides or [])
    error = caught.value
    return list(error.problems) if isinstance(error, ConfigError) else [error]


# Reading, extending, overriding


def test_a_file_equals_the_same_mapping_given_to_the_schema(run_file: Path) -> None:
    assert load_run(run_file) == RunConfig.model_validate(yaml.safe_load(MINIMAL))


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(
        tmp_path,
        "base/root.yaml",
        MINIMAL + "training: {steps: 5, optimizer: {betas: [0.1, 0.2], learning_rate: 1e-3}}\n",
    )
    write(tmp_path, "base/middle.yaml", "extends: root.yaml\nname: middle\ntraining: {steps: 6}\n")
    child = write(
        tmp_path,
        "child.yaml",
        "extends: base/middle.yaml\ntraining: {optimizer: {betas: [0.3, 0.4]}}\n",
    )
    run = load_run(child)
    assert run.name == "middle"
    assert run.training.steps == 6
    assert run.training.optimizer.betas == (0.3, 0.4)
    assert run.training.optimizer.learning_rate == 1e-3


def test_another_kind_replaces_the_parents_block_whole(tmp_path: Path) -> None:
    write(
        tmp_path,
        "root.yaml",
        MINIMAL + "encoders: {image: {kind: vit, model: m, channels: 8, patch: 4}}\n",
    )
    child = write(
        tmp_path, "child.yaml", "extends: root.yaml\nencoders: {image: {kind: pixels, patch: 2}}\n"
    )
    assert load_run(child).encoders.image.model_dump() == {"kind": "pixels", "patch": 2}
    same = write(
        tmp_path, "same.yaml", "extends: root.yaml\nencoders: {image: {kind: vit, patch: 7}}\n"
    )
    image = load_run(same).encoders.image.model_dump(exclude_defaults=True)
    assert image == {"model": "m", "channels": 8, "patch": 7}


def test_another_kind_on_the_command_line_replaces_the_block_whole(tmp_path: Path) -> None:
    path = write(
        tmp_path, "run.yaml", MINIMAL + "encoders: {image: {kind: vit, model: m, channels: 8}}\n"
    )
    run = load_run(path, ["encoders.image.kind=vae", "encoders.image.model=v"])
    assert run.encoders.image.model_dump(exclude_defaults=True) == {"model": "v"}
    assert run.encoders.image.kind == "vae"


def test_merge_leaves_both_sides_alone() -> None:
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    above = {"a": {"c": [3]}, "e": None}
    assert merge(below, above) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": None}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_overrides_are_yaml_values(run_file: Path) -> None:
    run = load_run(
        run_file,
        [
            "training.steps=10",
            "training.optimizer.learning_rate=3e-4",
            "training.optimizer.gradient_clip=null",
            "training.compile=true",
            "model.head.width=128",
            "data.buckets=[[64, 32], [32, 64]]",
            "grid.prompts=[a red cube, 207]",
            "tracking.wandb=off",
            "name=a=b",
        ],
    )
    assert run.training.steps == 10
    assert run.training.optimizer.learning_rate == 3e-4
    assert run.training.optimizer.gradient_clip is None
    assert run.training.compile is True
    assert run.model.head is not None and run.model.head.width == 128
    assert run.data.buckets == ((64, 32), (32, 64))
    assert run.grid.prompts == ("a red cube", "207")
    assert run.tracking.wandb == "off"
    assert run.name == "a=b"


def test_a_later_override_wins() -> None:
    assert parse_overrides(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("text", ["training.steps", "=3", "training..steps=3", ".a=1"])
def test_an_override_that_is_none_is_refused(run_file: Path, text: str) -> None:
    with pytest.raises(InputError, match="KEY=VALUE"):
        load_run(run_file, [text])


def test_the_dump_loads_back_equal(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: t", 'name: "1e-3"') + (
        "encoders:\n"
        "  image: {kind: vit, model: 'null'}\n"
        "  text: {kind: none}\n"
        "  decoder: {kind: rae, model: 'on: off # x'}\n"
        "grid: {prompts: ['off', '12', 'é: ü', '']}\n"
        "training: {optimizer: {eps: 1e-12}, schedule: {decay: cosine}}\n"
    )
    run = load_run(write(tmp_path, "run.yaml", text))
    dumped = dump_run(run)
    assert parse_run(dumped, "dump") == run
    assert load_run(write(tmp_path, "again.yaml", dumped)) == run
    assert dump_run(parse_run(dumped, "dump")) == dumped
    assert yaml.safe_load(dumped)["grid"]["prompts"] == ["off", "12", "é: ü", ""]


@pytest.mark.parametrize(
    ("head", "width"), [("", 2048), (", head: null", None), (", head: {width: 64}", 64)]
)
def test_a_head_taken_away_stays_away_and_one_left_out_is_the_presets(
    tmp_path: Path, head: str, width: int | None
) -> None:
    text = MINIMAL.replace("{width: 64, depth: 2, heads: 4}", f"{{preset: DiT-DH-S{head}}}")
    run = load_run(write(tmp_path, "run.yaml", text))
    saved = RunConfig.model_validate(run.model_dump(mode="json"))
    resolved = run.model_copy(update={"model": with_preset(run.model)})
    for again in (run, parse_run(dump_run(run), "dump"), saved, parse_run(dump_run(resolved), "")):
        found = with_preset(again.model).head
        assert (found.width if found else None) == width
    child = write(tmp_path, "child.yaml", "extends: run.yaml\n")
    without = load_run(child, ["model.head=null"])
    assert with_preset(without.model).head is None


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run.yaml",
        MINIMAL.replace("name: t", "name: 2026-01-31")
        + "tracking: {wandb: off}\ntraining: {optimizer: {eps: 1e-9}, steps: 1_000}\n",
    )
    run = load_run(path)
    assert (run.name, run.tracking.wandb) == ("2026-01-31", "off")
    assert (run.training.optimizer.eps, run.training.steps) == (1e-9, 1000)


# Refusing


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("training.step=3", "training.step", "training.steps"),
        ("model.head.widht=3", "model.head.widht", "model.head.width"),
        ("trainig.steps=3", "trainig", "training"),
        ("encoders.image={kind: vit, model: m, chanels: 3}", "encoders.image.chanels",
         "encoders.image.channels"),
        ("training.learning_rate=3", "training.learning_rate", "training.optimizer.learning_rate"),
        ("model.conditioning={kind: class, clases: 3}", "model.conditioning.clases",
         "model.conditioning.num_classes"),
        ("model.zzz=3", "model.zzz", ""),
        ("grid.guidance=2", "grid.guidance", "grid.sampling.guidance"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_in_full_with_the_nearest_existing(
    run_file: Path, override: str, path: str, suggestion: str
) -> None:
    (problem,) = problems_of(run_file, [override])
    assert problem.found.startswith(f"{path} (on the command line)")
    assert problem.remedy == (f"did you mean {suggestion}?" if suggestion else f"remove {path}")


def test_a_key_of_another_kind_says_which(run_file: Path) -> None:
    (problem,) = problems_of(run_file, ["encoders.decoder={kind: pixels, model: m}"])
    assert problem.found.startswith("encoders.decoder.model (on the command line)")
    assert problem.remedy == "remove it, or set encoders.decoder.kind to rae or vae, which has it"


@pytest.mark.parametrize(
    ("override", "found", "required"),
    [
        ("training.steps='10'", 'training.steps = "10"', "a whole number"),
        ("training.steps=1.5", "training.steps = 1.5", "a whole number"),
        ("training.steps=0", "training.steps = 0", "greater than 0"),
        ("training.ema_decays=[0.9, 1]", "training.ema_decays[1] = 1", "less than 1"),
        ("training.ema_decays=[]", "training.ema_decays = []", "at least 1 item"),
        ("training.compile=1", "training.compile = 1", "true or false"),
        ("data.crop=middle", 'data.crop = "middle"', "center or random"),
        ("diffusion.shift=big", 'diffusion.shift = "big"', "dimension or a number"),
        ("diffusion.shift=-1", "diffusion.shift = -1", "dimension or greater than 0"),
        ("diffusion.shift=.inf", "diffusion.shift = Infinity", "dimension or a finite number"),
        ("diffusion.timesteps.mean=.nan", "diffusion.timesteps.mean = NaN", "a finite number"),
        ("training.precision=fp16", 'training.precision = "fp16"', "fp32, tf32 or bf16"),
        ("training.optimizer.betas=[0.9, 1]", "training.optimizer.betas[1] = 1", "less than 1"),
        ("data.background=[0, 256, 0]", "data.background[1] = 256", "equal to 255"),
        ("data.buckets=[[64, 0]]", "data.buckets[0][1] = 0", "greater than 0"),
        ("name=3", "name = 3", "text"),
        ("data.background=3", "data.background = 3", "a list"),
        ("model.registers=3", "model.registers = 3", "a block of settings"),
        ("training.steps={a: 1}", "training.steps = a block of settings", "a whole number"),
        ("training.optimizer.betas=[0.9]", "training.optimizer.betas with too few", "betas[1]"),
        ("model.conditioning.kind=klass", 'model.conditioning.kind = "klass"', "class, cross"),
        ("encoders.text.max_length=3", "encoders.text without a kind", "bytes, transformers, none"),
        ("encoders.image={kind: vit}", "no encoders.image.model", "a value"),
    ],
)
def test_a_wrong_value_says_found_and_required(
    run_file: Path, override: str, found: str, required: str
) -> None:
    (problem,) = problems_of(run_file, [override])
    assert problem.found.startswith(found)
    assert required in problem.required
    assert problem.remedy


def test_all_problems_of_a_load_come_together_with_their_sources(tmp_path: Path) -> None:
    root = write(tmp_path, "root.yaml", MINIMAL + "training: {steps: ten}\n")
    child = write(tmp_path, "child.yaml", "extends: root.yaml\nmodle: {width: 3}\nseed: -1\n")
    with pytest.raises(ConfigError) as caught:
        load_run(child, ["data.workers=many"])
    found = {problem.found.split(" (")[0]: problem.found for problem in caught.value.problems}
    assert set(found) == {'training.steps = "ten"', "modle", "seed = -1", 'data.workers = "many"'}
    assert str(root) in found['training.steps = "ten"']
    assert str(child) in found["modle"]
    assert "on the command line" in found['data.workers = "many"']
    text = str(caught.value)
    assert text.startswith(f"4 problems in {child}\n1. found: ")
    assert text.count("what to do: ") == 4
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == text


def test_parents_must_exist_and_end(tmp_path: Path) -> None:
    orphan = write(tmp_path, "orphan.yaml", "extends: nowhere.yaml\n")
    with pytest.raises(InputError, match=r"no file .*nowhere\.yaml, named by extends in .*orphan"):
        load_run(orphan)
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(InputError, match=r"a\.yaml → b\.yaml → a\.yaml"):
        load_run(tmp_path / "a.yaml")
    two = write(tmp_path, "two.yaml", "extends: [a.yaml, b.yaml]\n")
    with pytest.raises(InputError, match="one YAML file"):
        load_run(two)
    with pytest.raises(InputError, match="configs/"):
        load_run(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "seed: 1\nseed: 2\n", "'seed' twice, in lines 6 and 7"),
        (MINIMAL + "training:\n  steps: 1\n  steps: 1\n", "'steps' twice, in lines 7 and 8"),
        ("name: [\n", "valid YAML"),
        ("- name\n", "list at the top"),
        ("name: !!python/object:os.system {}\n", "valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(InputError, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_the_config_package_needs_no_torch(run_file: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import dsr_scale.config.costs, dsr_scale.config.checks, dsr_scale.config.reference\n"
        "from dsr_scale.config.load import load_run\n"
        f"print(load_run({str(run_file)!r}).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "t"


def test_averages_are_named_without_a_dot() -> None:
    names = {0.9999: "ema_9999", 0.9: "ema_9", 0.0: "ema_0", 1e-05: "ema_00001", 0.09: "ema_09"}
    assert {decay: ema_name(decay) for decay in names} == names
