"""What one method alone needs of a run; each recipe builds on the loop, and the loop knows none."""
