"""From token statistics to one scalar and the metrics trainers log."""
