"""Two run folders compared: paired by sample, judged with the doubt that so many samples leave."""
