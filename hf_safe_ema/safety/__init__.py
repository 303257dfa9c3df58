"""Measuring safety: prompts, responses, verdicts, reports. Knows models and text; does not know training."""
