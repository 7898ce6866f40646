"""The steps that are no published rule: normalisation, language, licences, quality, scrubbing, and the corpus steps."""
