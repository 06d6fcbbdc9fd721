"""A pytest plugin (`-p patched_models`) that patches every transformer of a supported family when it is constructed.

The session ends with a line of the calls that fused operators served and of those that ran the original.
"""

import contextlib
import functools
from collections import Counter

import uniref_fast
from uniref_fast.models.families import families

REPORTS = []


def pytest_configure(config):
    for family in families():
        kind = family.transformer_class()
        if kind is not None and family.reason_against("patch") is None:
            kind.__init__ = _patching(kind, kind.__init__)


def _patching(kind, original):
    @functools.wraps(original)
    def construct(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is kind:
            with contextlib.suppress(ValueError):  # a configuration that patch refuses
                REPORTS.append(uniref_fast.patch(self))

    return construct


def pytest_terminal_summary(terminalreporter):
    calls = sum((report.calls for report in REPORTS), Counter()).total()
    fallbacks = sum((report.fallbacks for report in REPORTS), Counter())
    terminalreporter.write_line(f"patched models: {len(REPORTS)}")
    terminalreporter.write_line(f"accelerated calls: {calls}")
    terminalreporter.write_line(f"original calls: {fallbacks.total()}")
    for reason, count in fallbacks.most_common(12):
        terminalreporter.write_line(f"  {count} x {reason}")
