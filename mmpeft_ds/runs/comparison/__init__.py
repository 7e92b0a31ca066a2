"""A comparison of methods at equal trainable budgets: its rows, their results in peft's form, tables and plots."""
