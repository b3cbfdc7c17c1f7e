"""Engines that turn prompts into tokens: one adapter a file, all behind `base.Engine`."""
