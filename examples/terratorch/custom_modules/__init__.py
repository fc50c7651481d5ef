"""Imported by TerraTorch when it is started in the folder above: registers the backbone `mmmae_encoder`."""

import mmmae.interop.terratorch  # noqa: F401
