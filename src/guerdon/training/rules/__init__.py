"""Credit rules: from an :class:`~guerdon.training.streams.Experience` to one advantage per token, one idea a file.

A rule is a callable ``(experience, config) -> [N] advantages`` (or whole streams). It says what it ``needs`` (of
``"group"``, ``"critic"``, ``"steps"``, ``"tokens"``, ``"reference"``, ``"channels"``), so that senseless combinations
are refused before a model loads; its mathematics is a pure function in :mod:`guerdon.credit`. Its name in a
configuration stands in :mod:`guerdon.names`.
"""
