"""Losses: functions of tensors only."""
