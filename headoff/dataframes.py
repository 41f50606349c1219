"""Results as pandas DataFrames, where pandas is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headoff.errors import SettingError

if TYPE_CHECKING:
    import pandas


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
