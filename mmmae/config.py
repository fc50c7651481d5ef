"""The config of a model: a validated dataclass with three presets, to and from JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from torch import nn

from mmmae_kernels.checks import described

from .checks import check_number, check_whole, is_whole
from .files import json_value

Preset: TypeAlias = Literal["base", "vit", "tiny"]
AuxEncoder: TypeAlias = Literal["vit", "cnn"]
Masking: TypeAlias = Literal["tokens", "spectra", "bands"]
Target: TypeAlias = Literal["embedding", "pixels"]
StreamType: TypeAlias = Literal["float32", "bfloat16"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "base": {},
    "vit": {"mlp_ratio": 4.0},
    "tiny": {
        "dim": 64,
        "depth": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "aux_dim": 32,
        "aux_depth": 1,
        "decoder_dim": 32,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
}
MOST_LAYERS, MOST_OF_ANYTHING, MOST_PARAMETERS = 10_000, 10**9, 10**11  # of a config that is no slip or attack


@dataclasses.dataclass(frozen=True)
class MMMAEConfig:
    """The shape of a multi-modal guided masked autoencoder. The defaults are the `base` preset.

    Args:
        image_size: height and width in pixels that every image is resized to; a multiple of the patch
        bands: spectral bands T of the HSI volume; a multiple of the spectral patch
        in_channels: channels C of the HSI volume; 1 for reflectance cubes
        wavelengths: wavelengths of the bands in nm, or None; where they are known, spectral position embeddings start
            from them and can be carried over to bands at other wavelengths
        patch: bands x rows x columns of one token
        dim: width of the HSI encoder
        depth: transformer blocks of the HSI encoder
        heads: attention heads of the HSI encoder
        mlp_ratio: hidden width of the HSI encoder's MLPs over `dim`
        aux: name and channels of each auxiliary modality, in the order of their vectors
        aux_encoder: kind of the auxiliary encoders, `vit` or `cnn`
        aux_dim: width of each auxiliary encoder
        aux_depth: blocks of each auxiliary encoder
        aux_patch: patch size of a `vit`, total stride of a `cnn`
        conditioning_depth: attention steps from HSI tokens to auxiliary vectors; 0: no conditioning
        conditioning_dropout: probability, in training, that a modality is hidden from a sample's conditioning
        decoder_dim: width of the decoder
        decoder_depth: transformer blocks of the decoder
        decoder_heads: attention heads of the decoder
        mask_ratio: share of the tokens that is masked
        masking: what is masked as a whole: `tokens`, each by itself; `spectra`, all tokens of a place; or `bands`, all
            tokens of a spectral group
        decode_fraction: share of the masked tokens that the decoder sees and predicts, the first of `mask.ids_masked`:
            a random share where the mask is drawn, the user's choice where it is given
        target: what the decoder predicts, `embedding` or `pixels`
        normalize_target: normalise each target token to mean 0 and variance 1
        temperature: temperature of the contrastive logits
        contrastive_weight: weight of the contrastive loss in the total
        symmetric: contrast images against volumes too, and average both directions
        activation_checkpointing: in training, keep only the input of each transformer block of encoder and decoder,
            and compute the rest again in backward: less memory for more time
        residual_stream: type of the fast model's residual streams in encoder and decoder under autocast to bfloat16,
            `float32` or `bfloat16`: fewer bytes to move and to save for backward, for rounding at every addition; no
            effect without such autocast

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is expected.
    """

    image_size: int = 224
    bands: int = 12
    in_channels: int = 1
    wavelengths: tuple[float, ...] | None = None
    patch: tuple[int, int, int] = (3, 16, 16)
    dim: int = 768
    depth: int = 16
    heads: int = 12
    mlp_ratio: float = 1.0
    aux: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"ir": 1, "af": 1, "thickness": 1})
    aux_encoder: AuxEncoder = "vit"
    aux_dim: int = 256
    aux_depth: int = 8
    aux_patch: int = 32
    conditioning_depth: int = 1
    conditioning_dropout: float = 0.0
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    mask_ratio: float = 0.75
    masking: Masking = "tokens"
    decode_fraction: float = 1.0
    target: Target = "embedding"
    normalize_target: bool = False
    temperature: float = 0.07
    contrastive_weight: float = 0.1
    symmetric: bool = False
    activation_checkpointing: bool = False
    residual_stream: StreamType = "float32"

    # The MLP ratio of the decoder and the auxiliary encoders; `mlp_ratio` is that of the HSI encoder only.
    plain_mlp_ratio: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        counts = ("image_size", "bands", "in_channels", "dim", "depth", "heads", "aux_dim", "aux_depth", "aux_patch")
        for field in (*counts, "decoder_dim", "decoder_depth", "decoder_heads"):
            check_whole(f"config: {field}", getattr(self, field), 1)
        check_whole("config: conditioning_depth", self.conditioning_depth, 0)
        for field in (*counts, "conditioning_depth", "decoder_dim", "decoder_depth", "decoder_heads"):
            most = MOST_LAYERS if field.endswith("depth") else MOST_OF_ANYTHING
            self._expect(field, getattr(self, field) <= most, f"at most {most}")
        patch = self.patch
        is_patch = isinstance(patch, (tuple, list)) and len(patch) == 3 and all(is_whole(p, 1) for p in patch)
        self._expect("patch", is_patch, "three whole numbers >= 1: bands, rows, columns")
        self._expect("patch", max(patch) <= MOST_OF_ANYTHING, f"numbers of at most {MOST_OF_ANYTHING}")
        object.__setattr__(self, "patch", tuple(patch))
        pt, ph, pw = self.patch
        self._expect("bands", self.bands % pt == 0, f"a multiple of the spectral patch {pt}")
        self._check_wavelengths()
        self._expect(
            "image_size",
            self.image_size % math.lcm(ph, pw) == 0,
            f"a multiple of the spatial patch {ph} x {pw}",
        )
        self._expect("heads", self.dim % self.heads == 0, f"a divisor of dim {self.dim}")
        self._expect("decoder_heads", self.decoder_dim % self.decoder_heads == 0, f"a divisor of {self.decoder_dim}")
        check_number("config: mlp_ratio", self.mlp_ratio, "> 0")
        self._expect("mlp_ratio", self.mlp_ratio <= MOST_OF_ANYTHING, f"at most {MOST_OF_ANYTHING}")
        self._expect("mlp_ratio", round(self.dim * self.mlp_ratio) >= 1, f"enough for one channel of {self.dim}")
        self._check_aux()
        self._check_parameters()
        check_number("config: conditioning_dropout", self.conditioning_dropout, "in [0, 1)")
        self._check_masking()
        check_number("config: decode_fraction", self.decode_fraction, "in (0, 1]")
        masked = self.tokens - self.keep
        enough = self.decoded >= 1 or masked == 0
        self._expect("decode_fraction", enough, f"large enough to predict one of {masked} masked tokens")
        self._expect("target", self.target in ("embedding", "pixels"), "'embedding' or 'pixels'")
        check_number("config: temperature", self.temperature, "> 0")
        check_number("config: contrastive_weight", self.contrastive_weight, ">= 0")
        for field in ("normalize_target", "symmetric", "activation_checkpointing"):
            self._expect(field, isinstance(getattr(self, field), bool), "true or false")
        self._expect("residual_stream", self.residual_stream in ("float32", "bfloat16"), "'float32' or 'bfloat16'")
        _ = self.dropout_threshold  # computed here, as the checks above compute the other counts

    def _check_wavelengths(self) -> None:
        if self.wavelengths is None:
            return
        try:
            wavelengths = tuple(float(wavelength) for wavelength in self.wavelengths)
        except (TypeError, ValueError, OverflowError):
            wavelengths = ()
        self._expect("wavelengths", bool(wavelengths), "finite numbers > 0 in nm, one a band")
        for band, wavelength in enumerate(wavelengths):
            if not 0 < wavelength < math.inf:
                raise ValueError(
                    f"config: wavelengths has {wavelength:g} for band {band}, expected a finite number > 0 in nm"
                )
        if len(wavelengths) != self.bands:
            given = f"{len(wavelengths)} numbers, {wavelengths[0]:g} to {wavelengths[-1]:g}"
            raise ValueError(f"config: wavelengths is {given}, expected one in nm for each of bands = {self.bands}")
        object.__setattr__(self, "wavelengths", wavelengths)

    def _check_masking(self) -> None:
        check_number("config: mask_ratio", self.mask_ratio, "in [0, 1)")
        self._expect("masking", self.masking in ("tokens", "spectra", "bands"), "'tokens', 'spectra' or 'bands'")
        units = f"{self.mask_units} {'groups of bands' if self.masking == 'bands' else self.masking}"
        self._expect("mask_ratio", self.keep >= 1, f"small enough to keep one of {units}")
        if self.masking != "tokens" and self.mask_ratio > 0:
            self._expect("mask_ratio", self.keep < self.tokens, f"large enough to mask one of {units}")

    def _check_aux(self) -> None:
        self._expect("aux", isinstance(self.aux, Mapping), "a mapping of name to channels")
        taken = nn.ModuleDict()
        for name, channels in self.aux.items():
            is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name) and not hasattr(taken, name)
            self._expect(
                "aux", bool(is_name), f"names of letters, digits and _ that PyTorch can register, not {name!r}"
            )
            self._expect("aux", is_whole(channels, 1), f"whole channel counts >= 1, not {name}: {channels}")
            self._expect("aux", channels <= MOST_OF_ANYTHING, f"at most {MOST_OF_ANYTHING} channels")
        object.__setattr__(self, "aux", dict(self.aux))
        self._expect("aux_encoder", self.aux_encoder in ("vit", "cnn"), "'vit' or 'cnn'")
        if not self.aux:
            return
        if self.aux_encoder == "vit":
            fits = self.image_size % self.aux_patch == 0
            self._expect("aux_patch", fits, f"a divisor of image_size {self.image_size}")
            self._expect("aux_dim", self.aux_dim % self.aux_heads == 0, f"a multiple of its {self.aux_heads} heads")
        else:
            self._expect("aux_patch", self.aux_patch % 4 == 0, "a multiple of 4 for the cnn: its stem takes a quarter")
            self._expect("aux_patch", self.aux_patch <= self.image_size, f"at most image_size {self.image_size}")
            self._expect("aux_dim", self.aux_dim % 32 == 0, "a multiple of 32 for the cnn: 8 groups in a quarter of it")

    def _check_parameters(self) -> None:
        """Raise ValueError if the model would have more parameters than memory can hold anywhere."""
        count = self.least_parameters
        if count > MOST_PARAMETERS:
            part, share = max(self._matrix_sizes().items(), key=lambda entry: entry[1])
            raise ValueError(
                f"config: the model would have {count:.3g} parameters, expected at most {MOST_PARAMETERS:.0e}; "
                f"{share:.3g} of them follow from {part}"
            )

    def _matrix_sizes(self) -> dict[str, int]:
        """Return the parameters in matrices and position embeddings by the fields that they follow from."""
        hidden, (t, h, w) = round(self.dim * self.mlp_ratio), self.grid
        patch = self.in_channels * math.prod(self.patch)
        aux = 12 * self.aux_depth * self.aux_dim**2 if self.aux_encoder == "vit" else 0
        images = sum(aux + channels * self.aux_dim for channels in self.aux.values())
        return {
            "dim, depth and mlp_ratio": self.depth * self.dim * (4 * self.dim + 2 * hidden),
            "dim, patch and in_channels": self.dim * patch,
            "dim and conditioning_depth": self.conditioning_depth * 4 * self.dim**2 if self.aux else 0,
            "dim, decoder_dim, image_size and bands": (h * w + t) * (self.dim + self.decoder_dim),
            "decoder_dim and decoder_depth": self.decoder_depth * 12 * self.decoder_dim**2,
            "decoder_dim and the target": self.decoder_dim * (self.dim + self.target_dim),
            "aux, aux_dim and aux_depth": images,
        }

    @property
    def least_parameters(self) -> int:
        """A number of parameters that the model has at least: biases, norms and smaller parts are not counted."""
        return sum(self._matrix_sizes().values())

    def _expect(self, field: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"config: {field} is {getattr(self, field)!r}, expected {allowed}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along bands, rows and columns."""
        pt, ph, pw = self.patch
        return self.bands // pt, self.image_size // ph, self.image_size // pw

    @property
    def tokens(self) -> int:
        """N, tokens of a volume."""
        return math.prod(self.grid)

    @property
    def mask_units(self) -> int:
        """The number of units that are visible or masked as a whole, see `masking`; each has as many tokens."""
        groups, rows, columns = self.grid
        return {"tokens": self.tokens, "spectra": rows * columns, "bands": groups}[self.masking]

    # Computed once, before torch.compile can turn the ratios into symbols, which it can't round.
    @functools.cached_property
    def keep(self) -> int:
        """K, visible tokens of a volume."""
        return round(self.mask_units * (1 - self.mask_ratio)) * (self.tokens // self.mask_units)

    @functools.cached_property
    def decoded(self) -> int:
        """M', predicted tokens of a volume."""
        return round((self.tokens - self.keep) * self.decode_fraction)

    @functools.cached_property
    def dropout_threshold(self) -> int:
        """Smallest 32-bit noise with which a modality conditions a sample, see `conditioning_dropout`."""
        return round(self.conditioning_dropout * 2**32)

    def decoded_of(self, masked: int) -> int:
        """Return how many tokens of a volume are predicted where a given mask masks `masked` of them."""
        return self.decoded if masked == self.tokens - self.keep else round(masked * self.decode_fraction)

    @property
    def aux_heads(self) -> int:
        """Heads of an auxiliary ViT: 64 wide each, as in the encoder and decoder."""
        return max(1, self.aux_dim // 64)

    @property
    def target_dim(self) -> int:
        """Channels of one predicted token."""
        return self.dim if self.target == "embedding" else self.in_channels * math.prod(self.patch)

    def replace(self, **changes: Any) -> MMMAEConfig:
        """Return a copy with some fields changed, validated again."""
        return MMMAEConfig.from_dict({**self.to_dict(), **changes})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MMMAEConfig:
        """Return the preset `base`, `vit` or `tiny`, with `overrides` in place of its fields."""
        if name not in PRESETS:
            raise ValueError(f"config: preset is {name!r}, must be one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        wavelengths = None if self.wavelengths is None else list(self.wavelengths)
        return {**dataclasses.asdict(self), "patch": list(self.patch), "wavelengths": wavelengths}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMMAEConfig:
        """Make a config from what `to_dict` returned; missing fields take their defaults."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}, must be one of {', '.join(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """Return the fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> MMMAEConfig:
        """Make a config from what `to_json` returned."""
        return cls.from_dict(parse_json(text))


def parse_json(text: str) -> dict[str, Any]:
    """Return the members of a JSON object with fields of a config, which are not checked."""
    try:
        values = json_value(text)
    except ValueError as error:
        raise ValueError(f"config: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: the text holds {described(values)}, expected a JSON object")
    return values


def _ignoring_use_cache(refuse: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    def set_attribute(config: Any, name: str, value: Any) -> None:
        if name != "use_cache":
            refuse(config, name, value)

    return set_attribute


# `transformers.Trainer` sets `use_cache` in the config of any model. There is no cache here, and configs stay frozen.
MMMAEConfig.__setattr__ = _ignoring_use_cache(MMMAEConfig.__setattr__)  # type: ignore[method-assign]


def resolve_config(config: MMMAEConfig | str, **overrides: Any) -> MMMAEConfig:
    """Return a config, or the preset of that name, with some fields changed."""
    if isinstance(config, str):
        return MMMAEConfig.preset(config, **overrides)
    if not isinstance(config, MMMAEConfig):
        raise ValueError(f"config is {described(config)}, expected a config or a preset's name")
    return config.replace(**overrides) if overrides else config
