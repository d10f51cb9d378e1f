"""`fastlora sweep`: a grid of few-shot runs, carried out once each, and the tables and figures of what came out."""
