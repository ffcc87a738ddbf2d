"""What is learnt: the accuracy study, and the shorter comparisons on real text."""
