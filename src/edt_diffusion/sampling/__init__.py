"""Samples by number: settings, labels, jobs that go on where they stopped."""
