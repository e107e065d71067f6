"""Tests of the SGLang backend with SGLang's own classes: `make test-vllm` has them too."""

from __future__ import annotations

from importlib.util import find_spec

# not find_spec("sglang"): that finds this folder
collect_ignore_glob = [] if find_spec("sglang.srt") else ["*.py"]
