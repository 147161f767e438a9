"""The model in this process, without a server, for jobs that bring processes of their own: Ray, Spark, Dask."""
