"""The methods that EPT is compared with."""
