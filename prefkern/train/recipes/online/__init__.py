"""Rounds on the policy's own answers: sample, judge, form the rows that the loss trains on."""
