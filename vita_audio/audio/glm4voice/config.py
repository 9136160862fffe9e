"""Reads the decoder's ``config.yaml`` as plain data.

The released file is meant for a loader that imports and calls the classes that the file names. Here it is
a tree of plain values: object tags are compared with the few that describe this decoder, nothing is imported,
and any other tag, key or value is refused in one line. The plain layout (``config_plain.yaml`` or
``config.json``: the same values without tags) is read as well.

Every size read here is checked again when the weights are loaded, key by key and shape by shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

CONFIG_FILES = ("config.yaml", "config_plain.yaml", "config.json")

_Section = TypeVar("_Section")


class ConfigError(ValueError):
    """A configuration file that this decoder does not support; the message names file, field and value."""


@dataclass(frozen=True)
class TokenEncoderConfig:
    """Relative-position block-causal transformer over codes (section 4.3)."""

    input_size: int = 512
    output_size: int = 512
    attention_heads: int = 8
    linear_units: int = 2048
    num_blocks: int = 6
    block_size: int = 10


@dataclass(frozen=True)
class LengthRegulatorConfig:
    """From code rate to mel rate (section 4.6); only the number of ratios matters."""

    channels: int = 80
    sampling_ratios: tuple[int, ...] = (1, 1, 1, 1)


@dataclass(frozen=True)
class SolverConfig:
    """Conditional flow matching (section 5)."""

    inference_cfg_rate: float = 0.7


@dataclass(frozen=True)
class EstimatorConfig:
    """Velocity network (section 4.9)."""

    in_channels: int = 320
    out_channels: int = 80
    channels: tuple[int, ...] = (256, 256)
    attention_head_dim: int = 64
    n_blocks: int = 4
    num_mid_blocks: int = 12
    num_heads: int = 8


@dataclass(frozen=True)
class FlowConfig:
    """Codes to mel (section 4). Defaults are the released sizes."""

    vocab_size: int = 16384
    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    input_frame_rate: float = 12.5
    mel_sampling_rate: int = 22050
    mel_hop_size: int = 256
    encoder: TokenEncoderConfig = field(default_factory=TokenEncoderConfig)
    length_regulator: LengthRegulatorConfig = field(default_factory=LengthRegulatorConfig)
    cfm: SolverConfig = field(default_factory=SolverConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)


@dataclass(frozen=True)
class F0PredictorConfig:
    """Pitch from mel (section 6.1)."""

    in_channels: int = 80
    cond_channels: int = 512


@dataclass(frozen=True)
class VocoderConfig:
    """Mel to waveform (section 6). Defaults are the released sizes."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate: int = 22050
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16)
    n_fft: int = 16
    hop_len: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 11)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_predictor: F0PredictorConfig = field(default_factory=F0PredictorConfig)


@dataclass(frozen=True)
class DecoderConfig:
    """Flow model and vocoder of one released folder."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)


def load_decoder_config(folder: str | Path) -> DecoderConfig:
    """Read the decoder's sizes from the first of ``CONFIG_FILES`` that the folder holds.

    Raises:
        ConfigError: the folder has no such file, or it holds a tag, key or value unknown to this decoder.
    """
    folder = Path(folder)
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            return _read(folder / name)
    raise ConfigError(f"{folder}: holds none of {', '.join(CONFIG_FILES)}; give the decoder's folder")


# Values that other variants of these networks set differently; ours implements exactly these.
_FIXED: dict[str, dict[str, Any]] = {
    "flow": {"output_type": "mel"},
    "encoder": {
        "input_layer": "linear",
        "pos_enc_layer_type": "rel_pos_espnet",
        "selfattention_layer_type": "block_rel_selfattn",
        "normalize_before": True,
        "use_cnn_module": False,
        "macaron_style": False,
        "activation_type": "swish",
        "key_bias": True,
        "static_chunk_size": 0,
        "use_dynamic_chunk": False,
    },
    "length_regulator": {"out_channels": None, "groups": 1},
    "decoder": {"n_spks": 1},
    "cfm": {"solver": "euler", "t_scheduler": "cosine"},
    "estimator": {"act_fn": "gelu"},
    "f0_predictor": {"num_class": 1},
}
# For training only: dropout is never applied at inference (section 7.4).
_TRAINING_ONLY = {
    "flow": {"only_mask_loss"},
    "encoder": {
        "dropout_rate",
        "positional_dropout_rate",
        "attention_dropout_rate",
    },
    "decoder": {"in_channels", "spk_emb_dim"},
    "cfm": {"sigma_min", "training_cfg_rate", "reg_loss_type"},
    "estimator": {"dropout"},
}
# The last component of the class that the released file names at each node.
_NODE_CLASSES = {
    "flow": {"MaskedDiffWithXvec"},
    "encoder": {"BlockConformerEncoder"},
    "length_regulator": {"InterpolateRegulator"},
    "decoder": {"ConditionalCFM"},
    "cfm": {"DictConfig"},
    "estimator": {"ConditionalDecoder"},
    "hift": {"HiFTGenerator"},
    "f0_predictor": {"ConvRNNF0Predictor"},
}
_SEEDING = {"random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed_all"}


class _Tagged(dict):
    """A mapping with an object tag; ``target`` is the name in the tag, which is never resolved."""

    target: str = ""


class _Reference(str):
    """``!ref <name>``: the value of another key."""


class _TreeLoader(yaml.SafeLoader):
    """YAML's safe loader, plus the object tags as inert data."""


def _construct_inert(loader: _TreeLoader, suffix: str, node: yaml.Node) -> _Tagged:
    values = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    tagged = _Tagged(values)
    tagged.target = suffix
    return tagged


def _construct_apply(loader: _TreeLoader, suffix: str, node: yaml.Node) -> None:
    if suffix not in _SEEDING:
        raise yaml.constructor.ConstructorError(problem=f"asks to call {suffix!r}")


def _construct_reference(loader: _TreeLoader, node: yaml.Node) -> _Reference:
    text = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else ""
    name = re.fullmatch(r"<(\w+)>", text)
    if name is None:
        raise yaml.constructor.ConstructorError(problem=f"computes a reference, {node.value!r}")
    return _Reference(name.group(1))


_TreeLoader.add_multi_constructor("!new:", _construct_inert)
_TreeLoader.add_multi_constructor("!name:", _construct_inert)
_TreeLoader.add_multi_constructor("!apply:", _construct_apply)
_TreeLoader.add_constructor("!ref", _construct_reference)


def _read(path: Path) -> DecoderConfig:
    text = path.read_text(encoding="utf-8")
    try:
        tree = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_TreeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: refused, the file {problem}; only plain values are read") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    reader = _TreeReader(path, tree)
    return reader.tagged_layout() if "flow" in tree else reader.plain_layout()


class _TreeReader:
    """Turns the tree of one file into configurations; tracks its position for error messages."""

    def __init__(self, path: Path, tree: Mapping[str, Any]):
        self.path = path
        self.tree = tree

    def tagged_layout(self) -> DecoderConfig:
        """The released layout: ``flow`` and ``hift`` nodes, and training settings, which are not read."""
        flow = self._node("flow", self.tree)
        solver = self._node("decoder", flow)
        parts = {
            "encoder": self._node("encoder", flow),
            "length_regulator": self._node("length_regulator", flow),
            "estimator": self._node("estimator", solver),
            "cfm": self._solver_parameters(solver),
        }
        own = {key: value for key, value in flow.items() if key not in {*parts, "decoder"}}
        self._check_rest("decoder", {k: v for k, v in solver.items() if k not in ("cfm_params", "estimator")})
        hift = self._node("hift", self.tree)
        config = DecoderConfig(self._flow(own, parts), self._vocoder(hift, self._node("f0_predictor", hift)))
        return self._checked(config)

    def plain_layout(self) -> DecoderConfig:
        """The same values without tags, one section per part."""
        sections = ("encoder", "length_regulator", "cfm", "estimator", "hift", "f0_predictor")
        parts = {name: self._node(name, self.tree) for name in sections}
        own = {key: value for key, value in self.tree.items() if key not in sections}
        vocoder = self._vocoder(parts.pop("hift"), parts.pop("f0_predictor"))
        return self._checked(DecoderConfig(self._flow(own, parts), vocoder))

    def _node(self, name: str, parent: Mapping[str, Any]) -> Mapping[str, Any]:
        node = parent.get(name)
        if not isinstance(node, Mapping):
            raise ConfigError(f"{self.path}: section {name!r} is missing or not a mapping")
        target = getattr(node, "target", "")
        if target and target.rpartition(".")[2] not in _NODE_CLASSES.get(name, ()):
            raise ConfigError(f"{self.path}: {name} is {target!r}, which is not part of this decoder")
        return node

    def _solver_parameters(self, solver: Mapping[str, Any]) -> Mapping[str, Any]:
        parameters = self._node("cfm", {"cfm": solver.get("cfm_params")})
        return self._node("cfm", {"cfm": parameters["content"]}) if "content" in parameters else parameters

    def _flow(self, own: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> FlowConfig:
        return self._section(
            "flow",
            FlowConfig,
            own,
            encoder=self._section("encoder", TokenEncoderConfig, parts["encoder"]),
            length_regulator=self._section(
                "length_regulator", LengthRegulatorConfig, parts["length_regulator"]
            ),
            cfm=self._section("cfm", SolverConfig, parts["cfm"]),
            estimator=self._section("estimator", EstimatorConfig, parts["estimator"]),
        )

    def _vocoder(self, hift: Mapping[str, Any], f0_predictor: Mapping[str, Any]) -> VocoderConfig:
        own = {key: value for key, value in hift.items() if key not in ("istft_params", "f0_predictor")}
        own |= self._node("istft_params", hift)
        return self._section(
            "hift",
            VocoderConfig,
            own,
            f0_predictor=self._section("f0_predictor", F0PredictorConfig, f0_predictor),
        )

    def _section(
        self, name: str, section: type[_Section], values: Mapping[str, Any], **parts: object
    ) -> _Section:
        """Fill a dataclass from ``values``; any other key must be a known one."""
        dataclass_type: Any = section
        known = {item.name: item.default for item in fields(dataclass_type) if item.name not in parts}
        self._check_rest(name, {key: value for key, value in values.items() if key not in known})
        given = {
            key: self._convert(f"{name}.{key}", self._resolve(values[key]), default)
            for key, default in known.items()
            if key in values
        }
        return section(**given, **parts)

    def _check_rest(self, name: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key in _TRAINING_ONLY.get(name, ()):
                continue
            fixed = _FIXED.get(name, {})
            if key not in fixed:
                raise ConfigError(f"{self.path}: unknown key {name}.{key}")
            if self._resolve(value) != fixed[key]:
                raise ConfigError(f"{self.path}: {name}.{key} is {value!r}; only {fixed[key]!r} is supported")

    def _resolve(self, value: Any) -> Any:
        if not isinstance(value, _Reference):
            return value
        if value not in self.tree or isinstance(self.tree[value], (Mapping, list, _Reference)):
            raise ConfigError(f"{self.path}: reference to {str(value)!r}, which is not a plain value")
        return self.tree[value]

    def _convert(self, name: str, value: Any, default: Any) -> Any:
        """The value, converted to the type of its default; YAML reads ``1e-06`` as a string."""
        try:
            if isinstance(default, tuple):
                return tuple(self._convert(name, item, default[0]) for item in value)
            number = float(value)
            if isinstance(value, bool) or number < 0 or (isinstance(default, int) and number != int(number)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            wanted = "a list" if isinstance(default, tuple) else f"a non-negative {type(default).__name__}"
            raise ConfigError(f"{self.path}: {name} is {value!r}; expected {wanted}") from None
        return type(default)(number)

    def _checked(self, config: DecoderConfig) -> DecoderConfig:
        """Check sizes that must agree with each other."""
        flow, vocoder = config.flow, config.vocoder
        samples_per_frame = vocoder.hop_len
        for rate in vocoder.upsample_rates:
            samples_per_frame *= rate
        inputs = 3 * flow.output_size + flow.length_regulator.channels
        rules = [
            (flow.encoder.input_size == flow.input_size, "encoder.input_size differs from flow.input_size"),
            (flow.estimator.in_channels == inputs, f"estimator.in_channels must be {inputs}"),
            (
                flow.estimator.out_channels == flow.output_size,
                "estimator.out_channels differs from output_size",
            ),
            (vocoder.in_channels == flow.output_size, "hift.in_channels differs from the flow's output_size"),
            (vocoder.sampling_rate == flow.mel_sampling_rate, "hift.sampling_rate differs from the mel's"),
            (samples_per_frame == flow.mel_hop_size, f"hift makes {samples_per_frame} samples per mel frame"),
            (flow.encoder.block_size > 0, "encoder.block_size must be positive"),
            (
                len(vocoder.upsample_rates)
                == len(vocoder.upsample_kernel_sizes)
                == len(vocoder.source_resblock_kernel_sizes)
                == len(vocoder.source_resblock_dilation_sizes),
                "hift needs one upsample kernel and one source resblock per upsample rate",
            ),
            (
                len(vocoder.resblock_kernel_sizes) == len(vocoder.resblock_dilation_sizes),
                "hift.resblock_kernel_sizes and resblock_dilation_sizes differ in length",
            ),
        ]
        for holds, problem in rules:
            if not holds:
                raise ConfigError(f"{self.path}: {problem}")
        return config
