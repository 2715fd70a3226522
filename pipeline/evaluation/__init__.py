"""Did it work, what else moved: answers, probabilities and damage, before and after an edit."""
