"""
The inbox: one transaction in Airflow's database decides whose an event is.

`models` has the tables, `manager` makes and migrates them, `entries` says what can be asked, and `transactions`
answers, a batch at a time. Nothing in here knows of HTTP, or of any listener but the contract.
"""
