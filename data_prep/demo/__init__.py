"""Demo data: parallel arithmetic word problems generated from templates."""
