"""Scheduler and admission: decides each step; never touches a tensor of the model."""
