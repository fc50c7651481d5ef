"""Wavelengths are found in the texts that writers of files give bands, and nothing is guessed from others."""

import pytest

from mmmae.data.readers.wavelengths import parse_wavelength


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Band 3 (0.55 um)", (0.55, "um")),
        (".55 um", (0.55, "um")),
        ("5.5e2 nm", (550, "nm")),
        ("B550nm", (550, "nm")),
        ("1 (0.55 Micrometers), 550 nm", (0.55, "Micrometers")),  # one wavelength, twice
        ("400-450 nm", (425, "nm")),
        ("B1 [433..453 nm]", (443, "nm")),
        ("Band 400-450 nm", (425, "nm")),
        ("Band 3 - 550 nm", (550, "nm")),  # a number of a band before its wavelength
        ("Band 300 - 550 nm", (550, "nm")),
        ("B300-550 nm", (550, "nm")),
        ("FWHM 10 nm, centre 550 nm", None),
        ("550,5 nm", None),
        ("1,550 nm", None),
        ("Band 3", None),
        ("550 nmi", None),
    ],
)
def test_a_wavelength_in_a_text_is_the_only_one_with_a_unit(text, found):
    assert parse_wavelength(text) == found
