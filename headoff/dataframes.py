"""Results as pandas DataFrames and xarray Datasets, where these packages are installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headoff.errors import SettingError

if TYPE_CHECKING:
    import pandas
    import xarray


def dataframe(rows: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    """A DataFrame of rows with the same keys.

    Raises:
        SettingError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise SettingError(
            "a DataFrame needs pandas: `pip install pandas`, or read the CSV tables of a report"
        ) from error
    return pandas.DataFrame(list(rows))


def dataset(
    arrays: Mapping[str, tuple[Sequence[str], Any]],
    coordinates: Mapping[str, Sequence[Any]],
    attributes: Mapping[str, Any],
) -> xarray.Dataset:
    """A Dataset of arrays with names of their dimensions.

    Raises:
        SettingError: xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise SettingError(
            "a Dataset needs xarray: `pip install xarray`, or read the .safetensors file of a report"
        ) from error
    return xarray.Dataset(dict(arrays), dict(coordinates), dict(attributes))
