"""Inference engines that keep their keys and values in the store; each module needs its engine installed."""
