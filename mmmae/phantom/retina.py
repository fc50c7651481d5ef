"""A generated eye: maps of pigments and tissue, its reflectance, and the images of other devices."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from .vessels import Array as Points
from .vessels import draw_vessels, grow_vessels

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

MODALITIES = ("ir", "af", "thickness")

# Absorption per unit of pigment: Gaussians (height, centre nm, width nm) that imitate the shape of published curves:
# the Soret and Q bands of haemoglobin, the falling slope of melanin, the 460 nm band of macular pigment.
ABSORPTION = {
    "melanin": ((1.0, 300.0, 260.0),),
    "artery": ((1.3, 415.0, 22.0), (0.45, 542.0, 14.0), (0.5, 577.0, 11.0), (0.06, 930.0, 90.0)),
    "vein": ((1.3, 432.0, 22.0), (0.5, 556.0, 24.0), (0.16, 640.0, 50.0), (0.06, 760.0, 25.0)),
    "xanthophyll": ((1.0, 455.0, 28.0),),
    "lipofuscin": ((0.8, 430.0, 75.0),),
}
IR_NM, AF_NM = 820.0, 488.0


def render(
    seed: int, index: int, size: tuple[int, int], wavelengths: Sequence[float], modalities: Sequence[str]
) -> dict[str, tuple[Array, Mask]]:
    """Render the images of a generated eye.

    Args:
        seed: of the population.
        index: number of the eye in the population.
        size: (H, W); the scene scales with the shorter side.
        wavelengths: `[T]` nm of the hyperspectral image.
        modalities: some of `MODALITIES`.

    Returns:
        For "hsi" and each of `modalities`, an image `[C, H, W]` and its field of view `[H, W]`. The units: reflectance
        for "hsi" and for "ir" at 820 nm, an arbitrary one for the fluorescence "af" at 488 nm, um for "thickness".
    """
    eye = _Eye(np.random.default_rng([seed, index, 0]), size)
    noise = np.random.default_rng([seed, index, 1])
    reflectance = eye.reflectance(wavelengths)
    grain = noise.standard_normal(reflectance.shape, dtype=np.float32)
    grain *= 0.002 + 0.009 * np.sqrt(reflectance.mean(0))  # photon noise grows with brightness
    reflectance += grain
    images = {"hsi": (reflectance, eye.field(0.0, 0.0))}
    draw: dict[str, tuple[Callable[[], Array], float, float]] = {  # image, blur in half sides, relative noise
        "ir": (eye.infrared, 0.007, 0.02),
        "af": (eye.autofluorescence, 0.010, 0.05),
        "thickness": (eye.thickness, 0.020, 0.006),
    }
    for stream, name in enumerate(MODALITIES, start=2):
        if name in modalities:
            image, blur, strength = draw[name]
            images[name] = _take(np.random.default_rng([seed, index, stream]), eye, image(), blur, strength)
    return images


def labels(seed: int, index: int, size: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], str]:
    """Return the labels of an eye that `render` draws with the same arguments.

    Returns:
        A mask `[H, W]`: 0 background, 1 vessel, 2 optic disc (with the vessels on it), 255 outside the field of view;
        and "left" or "right" for the eye, the side of the fovea that the disc lies on.
    """
    eye = _Eye(np.random.default_rng([seed, index, 0]), size)
    classes = np.zeros(size, dtype=np.uint8)
    classes[np.maximum(eye.artery, eye.vein) >= 0.25] = 1
    classes[eye.disc >= 0.5] = 2
    classes[~eye.field(0.0, 0.0)] = 255
    return classes, "right" if eye.side > 0 else "left"


def pigments(seed: int, index: int, size: tuple[int, int]) -> dict[str, Array]:
    """Return the amounts of pigment in an eye that `render` draws with the same arguments.

    Returns:
        For each pigment of `ABSORPTION`, a map `[H, W]` of the amount that its absorption is multiplied by. The blood
        of the choroid is arterial.
    """
    return _Eye(np.random.default_rng([seed, index, 0]), size).pigments()


def _take(rng: np.random.Generator, eye: "_Eye", image: Array, blur: float, strength: float) -> tuple[Array, Mask]:
    """Return `image [H, W]` as another device sees it: blurred, shifted by up to 1.5 % of the side, and noisy."""
    dx, dy = rng.uniform(-0.03, 0.03, 2)
    seen = ndimage.gaussian_filter(image, blur * eye.scale, truncate=3)
    seen = ndimage.shift(seen, (dy * eye.scale, dx * eye.scale), order=1, mode="nearest")
    seen = seen * (1 + strength * rng.standard_normal(seen.shape, dtype=np.float32))
    return seen[None], eye.field(dx, dy)


class _Eye:
    """The maps `[H, W]` of one eye. Lengths are in half the shorter image side, y points down."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        height, width = size
        self.scale = min(size) / 2
        self.x = ((np.arange(width, dtype=np.float32) - (width - 1) / 2) / self.scale)[None, :]
        self.y = ((np.arange(height, dtype=np.float32) - (height - 1) / 2) / self.scale)[:, None]

        self.side = side = rng.choice([-1.0, 1.0])
        self.centre, self.radius = rng.normal(0, 0.015, 2), rng.uniform(0.92, 0.97)
        self.cropped = rng.uniform(0.8, 0.9) if rng.random() < 0.3 else 1.0
        fovea = np.array([-0.14 * side, 0.02]) + rng.normal(0, 0.03, 2)
        disc = fovea + np.array([0.60 * side, -0.06]) + rng.normal(0, 0.02, 2)
        vessels = grow_vessels(rng, disc, fovea)
        self.artery = draw_vessels(vessels, False, height, width)
        self.vein = draw_vessels(vessels, True, height, width)

        slow, middle, grain = (self._texture(rng, cells) for cells in (5, 12, 40))
        choroid = np.exp(-((self._texture(rng, 13) / 0.45) ** 2)) * (0.6 + 0.4 * np.tanh(slow))
        self.disc, self.cup = self._optic_disc(rng, disc)
        squared = self._squared_distance(fovea)
        eccentricity = np.sqrt(squared)
        macula, pit, yellow = (np.exp(squared * np.float32(-0.5 / width**2)) for width in (0.17, 0.085, 0.11))
        pigmentation = rng.lognormal(0, 0.25)
        self.choroid = (0.30 + 0.05 * middle + 0.3 * choroid * rng.uniform(0.5, 1.3)) * (1 - 0.6 * self.disc)
        self.melanin = 0.55 * pigmentation * (1 + 0.09 * slow + 0.05 * middle + 0.05 * grain + 0.85 * macula)
        self.melanin *= (1 - 0.12 * choroid) * (1 - 0.62 * self.disc)
        self.xanthophyll = rng.uniform(0.2, 0.5) * yellow
        ring = np.exp(-(((eccentricity - 0.5) / 0.4) ** 2))
        self.lipid = self._deposits(rng, fovea)
        self.lipofuscin = rng.lognormal(-1.1, 0.2) * (0.7 + 0.6 * ring + 0.06 * slow + 0.06 * grain - 0.35 * pit)
        self.lipofuscin = (self.lipofuscin + 0.35 * self.lipid) * (1 - 0.96 * self.disc)
        self.nerve_fibres = self._nerve_fibres(disc)
        self.tissue = (  # um
            rng.normal(255, 10)
            + 75 * np.exp(-(((eccentricity - 0.24) / 0.17) ** 2))
            - 45 * pit
            + 110 * self.nerve_fibres
            + 10 * slow
            + 40 * self.lipid
            + 14 * (self.artery + self.vein)
            - 70 * self.cup
        )
        right, down = rng.normal(0, 0.07), rng.normal(0, 0.07)
        self.light = 1 - 0.28 * self._squared_distance(self.centre) + right * self.x + down * self.y
        self.light = np.maximum(self.light, 0.1) * rng.uniform(0.9, 1.1)

    def reflectance(self, wavelengths: Sequence[float]) -> Array:
        """Compute the reflectance `[T, H, W]` by the Beer-Lambert law; the light passes every pigment twice."""
        nm = np.asarray(wavelengths, dtype=np.float32)[:, None, None]
        sheen = np.clip((750 - nm) / 300, 0, 1)  # nerve fibres and deposits scatter short waves
        scatter = 0.5 + 0.05 * self.disc + 0.14 * self.cup + sheen * (0.10 * self.nerve_fibres + 0.35 * self.lipid)
        depth = np.zeros((len(nm), *self.disc.shape), dtype=np.float32)
        for name, amount in self.pigments().items():
            depth -= (2 * _absorption(name, nm)) * amount
        return np.asarray(scatter * self.light * np.exp(depth, out=depth), dtype=np.float32)

    def pigments(self) -> dict[str, Array]:
        """Return the amount `[H, W]` of each pigment."""
        amounts = {
            "melanin": self.melanin,
            "xanthophyll": self.xanthophyll,
            "lipofuscin": 0.6 * self.lipofuscin,
            "artery": 0.55 * self.artery + self.choroid,
            "vein": 0.7 * self.vein,
        }
        return {name: np.asarray(amount, dtype=np.float32) for name, amount in amounts.items()}

    def infrared(self) -> Array:
        vessels = 0.5 * self.artery + 0.7 * self.vein + 0.35 * self.choroid
        return np.asarray(self.reflectance([IR_NM])[0] * np.exp(-0.35 * vessels))

    def autofluorescence(self) -> Array:
        """Compute the fluorescence of lipofuscin, which lies behind the blood and the macular pigment."""
        nm = np.float32(AF_NM)
        depth = _absorption("xanthophyll", nm) * 1.6 * self.xanthophyll + 1.1 * self.artery + 1.3 * self.vein
        return np.asarray(self.lipofuscin * np.exp(-depth - 0.25 * self.melanin) * np.sqrt(self.light))

    def thickness(self) -> Array:
        return np.asarray(self.tissue, dtype=np.float32)

    def field(self, dx: float, dy: float) -> Mask:
        """Return the field of view `[H, W]`, shifted by (dx, dy): a disc, cropped at top and bottom in some eyes."""
        centre = self.centre + np.array([dx, dy])
        inside = self._squared_distance(centre) <= self.radius**2
        return np.asarray(inside & (np.abs(self.y - centre[1]) <= self.cropped * self.radius))

    def _squared_distance(self, point: Points) -> Array:
        return np.asarray((self.x - np.float32(point[0])) ** 2 + (self.y - np.float32(point[1])) ** 2)

    def _texture(self, rng: np.random.Generator, cells: int) -> Array:
        """Draw Gaussian noise of about unit variance, smooth over 2 / `cells`."""
        knots = np.linspace(-1.1, 1.1, cells, dtype=np.float32)
        values = rng.standard_normal((cells, cells), dtype=np.float32)

        def weights(position: Array) -> Array:  # [cells, positions]
            bumps = np.exp(-0.5 * ((position - knots[:, None]) * (cells / 2.2 / 0.7)) ** 2)
            return np.asarray(bumps / np.sqrt((bumps**2).sum(0) + 1e-6), dtype=np.float32)

        # einsum and not BLAS, whose sums may depend on the number of threads.
        rows = np.einsum("kh,kc->hc", weights(self.y.reshape(-1)), values)
        return np.asarray(np.einsum("hc,cw->hw", rows, weights(self.x.reshape(-1))))

    def _optic_disc(self, rng: np.random.Generator, point: Points) -> tuple[Array, Array]:
        """Draw soft masks of the optic disc and of the pale cup in it."""
        radius, cup = rng.uniform(0.115, 0.14), rng.uniform(0.35, 0.6)
        dx, dy = (self.x - np.float32(point[0])) * 1.08, self.y - np.float32(point[1])
        distance = np.asarray(np.sqrt(dx**2 + dy**2) / radius, dtype=np.float32)
        return np.asarray(0.5 - 0.5 * np.tanh((distance - 1) * 7)), np.asarray(
            0.5 - 0.5 * np.tanh((distance / cup - 1) * 3)
        )

    def _nerve_fibres(self, point: Points) -> Array:
        """Return the thickness of the nerve fibres, scaled to 1: largest above and below the disc, falling outwards."""
        distance = np.sqrt(self._squared_distance(point))
        upright = ((self.y - np.float32(point[1])) / (distance + 1e-3)) ** 2
        return np.asarray(np.exp(-distance / 0.42) * (0.25 + 0.75 * upright) * (1 - np.exp(-((distance / 0.13) ** 2))))

    def _deposits(self, rng: np.random.Generator, fovea: Points) -> Array:
        """Draw small pale lipid deposits around the fovea, in some of the eyes."""
        count = int(rng.integers(6, 30)) if rng.random() < 0.4 else 0
        places, widths = (fovea + rng.normal(0, 0.17, (30, 2))).tolist(), rng.uniform(0.008, 0.022, 30).tolist()
        total = np.zeros((self.y.size, self.x.size), dtype=np.float32)
        for place, width in zip(places[:count], widths[:count], strict=True):
            across = np.exp(-0.5 * ((self.x - place[0]) / width) ** 2)
            total += np.exp(-0.5 * ((self.y - place[1]) / width) ** 2) * across
        return np.minimum(total, 1)


def _absorption(pigment: str, nm: npt.NDArray[np.float32] | np.float32) -> Array:
    curves = (height * np.exp(-0.5 * ((nm - centre) / width) ** 2) for height, centre, width in ABSORPTION[pigment])
    return np.asarray(sum(curves), dtype=np.float32)
