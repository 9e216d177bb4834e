"""What the data packages leave open: which territories are no states, further names, and values left out.

A value is left out where sources disagree or one answer would be a judgement: several capitals, two
continents, a first-listed language that is not the main one.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "CAPITALS",
    "CURRENCIES",
    "DEPENDENT",
    "ELEMENTS",
    "LANGUAGES",
    "NAMES",
    "NO_CAPITAL",
    "NO_CONTINENT",
    "NO_LANGUAGE",
]


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


DEPENDENT = _codes(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR RE SH SJ SX TC TF TK UM VG VI WF YT"
)
"""ISO codes that GeoNames lists beside independent states."""

NO_CAPITAL = _codes("BO GQ IL LK NR PS ZA")
"""Disputed, shared between cities, absent, or moved lately."""

NO_CONTINENT = _codes("AM AZ CY GE KZ RU TL TR")
"""On two continents, or placed differently by different sources."""

NO_LANGUAGE = _codes("ER IN SG")
"""The language listed first is not the main one."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "US": ("United States", "USA", "United States of America", "US", "America"),
    "GB": ("United Kingdom", "UK", "Great Britain", "Britain"),
    "CD": ("DR Congo", "Democratic Republic of the Congo"),
    "CG": ("Republic of the Congo", "Congo-Brazzaville"),
    "CI": ("Ivory Coast", "Cote d'Ivoire"),
    "CN": ("China", "People's Republic of China", "PRC"),
    "CV": ("Cabo Verde", "Cape Verde"),
    "CZ": ("Czechia", "Czech Republic"),
    "MK": ("North Macedonia", "Macedonia"),
    "MM": ("Myanmar", "Burma"),
    "NL": ("The Netherlands", "Netherlands", "Holland"),
    "RU": ("Russia", "Russian Federation"),
    "SZ": ("Eswatini", "Swaziland"),
    "TL": ("Timor Leste", "East Timor"),
    "TR": ("Turkey", "Turkiye", "Türkiye"),
    "VA": ("Vatican", "Holy See"),
}
"""Names of countries; the first is the one shown."""

CAPITALS: Mapping[str, tuple[str, ...]] = {
    "KZ": ("Astana", "Nur-Sultan"),
    "US": ("Washington", "Washington, D.C.", "Washington DC"),
    "UA": ("Kyiv", "Kiev"),
    "BR": ("Brasilia", "Brasília"),
    "CO": ("Bogota", "Bogotá"),
    "CR": ("San Jose", "San José"),
    "PY": ("Asuncion", "Asunción"),
    "CM": ("Yaounde", "Yaoundé"),
    "TG": ("Lome", "Lomé"),
    "ST": ("Sao Tome", "São Tomé"),
    "MV": ("Male", "Malé"),
    "MD": ("Chisinau", "Chișinău", "Kishinev"),
    "MM": ("Nay Pyi Taw", "Naypyidaw"),
    "MN": ("Ulaanbaatar", "Ulan Bator"),
    "IS": ("Reykjavik", "Reykjavík"),
    "YE": ("Sanaa", "Sana'a"),
    "KI": ("Tarawa", "South Tarawa"),
    "PW": ("Melekeok", "Ngerulmud"),
    "CN": ("Beijing", "Peking"),
    "RO": ("Bucharest", "București"),
    "CH": ("Bern", "Berne"),
    "LU": ("Luxembourg", "Luxembourg City"),
    "IN": ("New Delhi", "Delhi"),
}
"""Corrected capitals and further spellings."""

CURRENCIES: Mapping[str, tuple[str, ...]] = {
    "USD": ("United States dollar", "American dollar", "U.S. dollar"),
    "GBP": ("British pound", "Sterling", "Great British pound"),
    "CNY": ("Renminbi", "Yuan", "Chinese yuan"),
    "ILS": ("New Israeli shekel", "Israeli shekel"),
    "JPY": ("Japanese yen",),
    "KRW": ("South Korean won",),
    "THB": ("Thai baht",),
    "ZAR": ("South African rand",),
    "UYU": ("Uruguayan peso",),
    "OMR": ("Omani rial",),
    "VES": ("Bolivar Soberano", "Venezuelan bolivar"),
    "PEN": ("Peruvian sol",),
    "PLN": ("Polish zloty", "Złoty"),
    "HUF": ("Hungarian forint",),
    "UAH": ("Ukrainian hryvnia",),
    "VND": ("Vietnamese dong",),
    "IDR": ("Indonesian rupiah",),
    "NGN": ("Nigerian naira",),
    "BDT": ("Bangladeshi taka",),
    "KZT": ("Kazakhstani tenge",),
    "MMK": ("Burmese kyat", "Myanmar kyat"),
    "KGS": ("Kyrgyzstani som",),
    "UZS": ("Uzbekistani som", "Uzbek som"),
    "ISK": ("Icelandic krona",),
    "AED": ("United Arab Emirates dirham", "Emirati dirham"),
    "XOF": ("West African CFA franc", "CFA franc"),
    "XAF": ("Central African CFA franc", "CFA franc"),
    "TOP": ("Tongan paanga",),
}
"""Further names of currencies, by ISO code."""

LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "Chinese": ("Mandarin", "Mandarin Chinese"),
    "Persian": ("Farsi", "Dari"),
    "Tagalog": ("Filipino",),
    "Kirghiz": ("Kyrgyz",),
    "Bengali": ("Bangla",),
    "Divehi": ("Dhivehi", "Maldivian"),
    "Chichewa": ("Chewa", "Nyanja"),
    "Haitian": ("Haitian Creole",),
    "Sinhala": ("Sinhalese",),
    "Khmer": ("Cambodian",),
    "Spanish": ("Castilian",),
    "Azerbaijani": ("Azeri",),
    "Malay": ("Bahasa Melayu",),
    "Indonesian": ("Bahasa Indonesia",),
    "Swahili": ("Kiswahili",),
    "Romanian": ("Moldovan",),
    "Tetum": ("Tetun",),
}
"""Further names of languages."""

ELEMENTS: Mapping[str, tuple[str, ...]] = {
    "Aluminum": ("Aluminium",),
    "Cesium": ("Caesium",),
    "Sulfur": ("Sulphur",),
}
"""Further spellings of elements."""
