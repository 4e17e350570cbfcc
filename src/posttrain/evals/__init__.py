"""What training did: reward-model accuracy, policies side by side, intervals, tables, curves, report."""
